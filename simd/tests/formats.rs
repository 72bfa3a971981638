//! The decoders against blocks and values written by gguf-py, and by hand where it knows no format.

use gemrun_simd::half::f32_to_f16;
use gemrun_simd::{Format, ggml_type_name};

/// Records of: type id, elements, bytes (u32 each), the blocks, the f32 values. Made by
/// `tests/data/make_dequant.py`.
#[test]
fn values_of_another_implementation() {
    let mut rest = &include_bytes!("../../tests/data/dequant.bin")[..];
    let mut seen = vec![];
    while !rest.is_empty() {
        let number = |i: usize| u32::from_le_bytes(rest[4 * i..][..4].try_into().unwrap());
        let (id, elems, bytes) = (number(0), number(1) as usize, number(2) as usize);
        let (blocks, after) = rest[12..].split_at(bytes);
        let (values, after) = after.split_at(4 * elems);
        rest = after;
        let format = Format::from_ggml(id).expect("a known format");
        seen.push(format);
        assert_eq!(format.row_bytes(elems), Some(bytes), "{format}");
        let mut ours = vec![f32::NAN; elems];
        format.unpack_row(blocks, &mut ours);
        for (i, (ours, want)) in ours.iter().zip(values.as_chunks().0).enumerate() {
            assert_eq!(*ours, f32::from_le_bytes(*want), "{format} element {i}");
        }
    }
    let by_hand = [Format::F32, Format::F16, Format::Q1_0, Format::Q2_0];
    for format in Format::ALL.into_iter().filter(|f| !f.is_channel()) {
        assert!(seen.contains(&format) || by_hand.contains(&format), "{format} is not tested");
    }
}

#[test]
fn q1_0_by_hand() {
    let mut block = [0; 18];
    block[..2].copy_from_slice(&f32_to_f16(0.5).to_le_bytes());
    (block[2], block[17]) = (0b0000_0101, 0b1000_0000);
    let mut values = [0.0; 128];
    Format::Q1_0.unpack_row(&block, &mut values);
    for (i, v) in values.into_iter().enumerate() {
        assert_eq!(v, if [0, 2, 127].contains(&i) { 0.5 } else { -0.5 }, "element {i}");
    }
}

#[test]
fn q2_0_by_hand() {
    let mut block = [0b01_01_01_01; 18];
    block[..2].copy_from_slice(&f32_to_f16(-2.0).to_le_bytes());
    (block[2], block[17]) = (0b11_10_01_00, 0b00_01_01_11);
    let mut values = [1.0; 64];
    Format::Q2_0.unpack_row(&block, &mut values);
    assert_eq!(values[..4], [2.0, 0.0, -2.0, -4.0]);
    assert!(values[4..60].iter().all(|v| *v == 0.0));
    assert_eq!(values[60..], [-4.0, 0.0, 0.0, 2.0]);
}

#[test]
fn floats_by_hand() {
    let mut out = [0.0; 3];
    Format::F32.unpack_row(&[0, 0, 128, 63, 0, 0, 0, 192, 1, 0, 0, 0], &mut out);
    assert_eq!(out, [1.0, -2.0, f32::from_bits(1)]);
    Format::F16.unpack_row(&[0, 0x3c, 0, 0xc0, 1, 0], &mut out);
    assert_eq!(out, [1.0, -2.0, 2f32.powi(-24)]);
}

#[test]
fn row_sizes() {
    assert_eq!(Format::Q4_0.row_bytes(1536), Some(864));
    assert_eq!(Format::Q6K.row_bytes(512), Some(420));
    assert_eq!(Format::Q4_0.row_bytes(0), Some(0));
    assert_eq!(Format::Q4_0.row_bytes(33), None);
    assert_eq!(Format::Q6K.row_bytes(32), None);
    assert_eq!(Format::F32.row_bytes(usize::MAX / 4 + 1), None);
    assert_eq!(Format::Q8_0.row_bytes(usize::MAX - 31), None);
}

#[test]
fn ids_and_names() {
    for format in Format::ALL {
        let Some(id) = format.ggml_id() else {
            assert!(format.is_channel() && Format::from_ggml(format as u32).is_none());
            continue;
        };
        assert_eq!(Format::from_ggml(id), Some(format));
        assert_eq!(ggml_type_name(id), Some((format.name(), format.block_elems(), format.block_bytes())));
    }
    assert_eq!(Format::Q4K.name(), "Q4_K");
    assert_eq!(ggml_type_name(16), Some(("IQ2_XXS", 256, 66)));
    assert_eq!(ggml_type_name(27), Some(("I64", 1, 8)));
    assert_eq!(ggml_type_name(40), Some(("NVFP4", 64, 36)));
    for id in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
        assert_eq!(ggml_type_name(id), None, "{id}");
        assert_eq!(Format::from_ggml(id), None, "{id}");
    }
    // Known, but not multiplied with.
    for id in [9, 15, 16, 24, 28, 40] {
        assert!(ggml_type_name(id).is_some() && Format::from_ggml(id).is_none(), "{id}");
    }
}

#[test]
#[should_panic(expected = "Q4_0: 17 bytes for 32 weights")]
fn short_rows_are_refused() {
    Format::Q4_0.unpack_row(&[0; 17], &mut [0.0; 32]);
}

/// Every byte of eight rows goes somewhere and comes back; where scales and weights go is as the drawing says.
#[test]
fn interleaving_is_a_permutation() {
    for format in Format::ALL.into_iter().filter(|f| f.interleaves()) {
        let rows: Vec<u8> = (0..16 * format.block_bytes()).map(|i| (i * 37 + i / 256) as u8).collect();
        let (mut dealt, mut back) = (vec![0; rows.len()], vec![0; rows.len()]);
        format.interleave(&rows, &mut dealt);
        assert_ne!(rows, dealt, "{format}");
        format.deinterleave(&dealt, &mut back);
        assert_eq!(rows, back, "{format}");
    }
    // Q4_0, row 3 of eight with one block: its scale, and its bytes 6..10 in the second vector.
    let rows: Vec<u8> = (0..8 * 18).collect();
    let mut dealt = vec![0; rows.len()];
    Format::Q4_0.interleave(&rows, &mut dealt);
    assert_eq!(dealt[6..8], rows[3 * 18..][..2]);
    assert_eq!(dealt[16 + 32 + 12..][..4], rows[3 * 18 + 6..][..4]);
}

/// The packing of the mobile checkpoints: lowest bits first; 2-bit codes stand for −2..=1, 4-bit codes for −8..=7.
#[test]
fn channel_wise_weights() {
    let mut out = [0.0; 32];
    Format::W2C.unpack_row(&[0b11_10_01_00, 0b00_01_10_11, 0, 0, 0, 0, 0, 0xff], &mut out);
    assert_eq!(out[..8], [-2.0, -1.0, 0.0, 1.0, 1.0, 0.0, -1.0, -2.0]);
    assert_eq!(out[28..], [1.0; 4]);
    let mut bytes = [0x88; 16];
    bytes[..2].copy_from_slice(&[0xf0, 0x79]);
    Format::W4C.unpack_row(&bytes, &mut out);
    assert_eq!(out[..6], [-8.0, 7.0, 1.0, -1.0, 0.0, 0.0]);
    let mut bytes = [1; 32];
    bytes[0] = 0x80;
    Format::W8C.unpack_row(&bytes, &mut out);
    assert_eq!(out[..2], [-128.0, 1.0]);
    // In blocks, whose scales (here: not a number) do not count.
    let mut block = [0xff; 66];
    block[..3].copy_from_slice(&[0b11_10_01_00, 0, 1]);
    let mut out = [0.0; 256];
    Format::Tq2_0C.unpack_row(&block, &mut out);
    assert_eq!(out[..4], [1.0, 1.0, 0.0, -2.0]);
    assert_eq!([out[32], out[64], out[96]], [0.0, -1.0, -2.0]);
}
