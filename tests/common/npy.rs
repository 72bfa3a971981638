//! Reads `.npy` files of little-endian f32, i8 and i32 in C order, the only kinds the golden data has.

/// An array with its shape; the last dimension is contiguous.
pub struct Npy {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Npy {
    /// Panics on anything but a version 1 to 3 file of one of those kinds. Integers must be exact as f32.
    pub fn read(file: &[u8]) -> Npy {
        assert_eq!(&file[..6], b"\x93NUMPY");
        let (header_start, header_len) = match file[6] {
            1 => (10, u16::from_le_bytes([file[8], file[9]]) as usize),
            _ => (12, u32::from_le_bytes(file[8..12].try_into().unwrap()) as usize),
        };
        let data_start = header_start + header_len;
        let header = std::str::from_utf8(&file[header_start..data_start]).unwrap();
        assert!(header.contains("'fortran_order': False"), "{header}");
        let (_, shape) = header.split_once("'shape': (").unwrap();
        let (shape, _) = shape.split_once(')').unwrap();
        let numbers = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
        let shape: Vec<usize> = numbers.map(|n| n.parse().unwrap()).collect();
        let data = &file[data_start..];
        let values = if header.contains("'descr': '<f4'") {
            floats(data)
        } else if header.contains("'descr': '|i1'") {
            data.iter().map(|&byte| f32::from(byte as i8)).collect()
        } else {
            assert!(header.contains("'descr': '<i4'"), "{header}");
            let ints = data.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
            assert!(ints.clone().all(|n| n.abs() <= 1 << 24));
            ints.map(|n| n as f32).collect()
        };
        assert_eq!(values.len(), shape.iter().product::<usize>());
        Npy { shape, values }
    }

    /// The rows of the array, seen as a matrix whose last dimension is the row.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.values.chunks_exact(*self.shape.last().unwrap())
    }
}

/// Little-endian f32 values.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    let (floats, rest) = bytes.as_chunks();
    assert!(rest.is_empty());
    floats.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}
