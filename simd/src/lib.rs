//! Block formats, activations and dot-product kernels.
