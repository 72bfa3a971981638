//! The oracle's dequantisers against values from gguf-py (see `data/make_dequant.py`), and the two formats
//! that gguf-py does not know against blocks written out by hand.

mod oracle;

use oracle::dequant;

#[test]
fn values_of_random_blocks() {
    let mut rest = &include_bytes!("data/dequant.bin")[..];
    let mut formats = 0;
    while !rest.is_empty() {
        let number = |i: usize| u32::from_le_bytes(rest[4 * i..4 * i + 4].try_into().unwrap());
        let (id, elements, bytes) = (number(0), number(1) as usize, number(2) as usize);
        let (blocks, after) = rest[12..].split_at(bytes);
        let (values, after) = after.split_at(4 * elements);
        rest = after;
        formats += 1;

        let format = dequant::format(id);
        assert_eq!(elements / format.elements * format.bytes, bytes, "{}", format.name);
        let ours = dequant::dequantise(format, blocks, elements);
        for (i, (ours, expected)) in ours.iter().zip(values.chunks_exact(4)).enumerate() {
            let expected = f32::from_le_bytes(expected.try_into().unwrap());
            assert_eq!(*ours, expected, "{} element {i}", format.name);
        }
    }
    assert_eq!(formats, 17);
}

#[test]
fn q1_0_by_hand() {
    let mut block = [0u8; 18];
    block[..2].copy_from_slice(&0x3800u16.to_le_bytes()); // 0.5
    block[2] = 0b0000_0101;
    block[17] = 0b1000_0000;
    let values = dequant::dequantise(dequant::by_name("Q1_0"), &block, 128);
    let positive: Vec<usize> = (0..128).filter(|&i| values[i] == 0.5).collect();
    assert_eq!(positive, [0, 2, 127]);
    assert_eq!(values.iter().filter(|&&v| v == -0.5).count(), 125);
}

#[test]
fn q2_0_by_hand() {
    let mut block = [0u8; 18];
    block[..2].copy_from_slice(&0xc000u16.to_le_bytes()); // -2
    block[2] = 0b11_10_01_00;
    block[17] = 0b01_01_01_11;
    let values = dequant::dequantise(dequant::by_name("Q2_0"), &block, 64);
    assert_eq!(values[..4], [2.0, 0.0, -2.0, -4.0]);
    assert!(values[4..60].iter().all(|&v| v == 2.0));
    assert_eq!(values[60..], [-4.0, 0.0, 0.0, 0.0]);
}
