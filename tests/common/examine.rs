//! What must hold of every GGUF file the reader accepts, and of every refusal.

use gemrun::gguf::write::Writer;
use gemrun::gguf::{Gguf, Value};
use gemrun::{Kind, Result};

/// The same keys and tensors again, through the writer.
pub fn rewrite(file: &Gguf) -> Vec<u8> {
    let data: Vec<_> = file.tensors().iter().map(|t| file.bytes(t)).collect();
    let mut w = Writer::new();
    for (key, value) in file.metadata() {
        w.metadata(key, value);
    }
    for (t, data) in file.tensors().iter().zip(&data) {
        w.tensor(&t.name, t.type_id, t.shape(), &data[..]);
    }
    w.to_vec().unwrap()
}

/// Looks at everything a file offers, as a user of it might; whatever was accepted must hold together, and must come
/// out the same after a trip through the writer.
pub fn examine(file: &Gguf) {
    for (key, value) in file.metadata() {
        assert_eq!(format!("{:?}", file.get(key)), format!("{:?}", Some(value)));
        assert!(!value.to_string().chars().any(char::is_control));
        if let Value::Array(array) = value {
            assert_eq!(array.values().count(), array.len());
            let as_typed = [
                array.strings().map(|x| x.count()),
                array.ints().map(|x| x.count()),
                array.floats().map(|x| x.count()),
                array.bools().map(|x| x.count()),
            ];
            for count in as_typed.into_iter().flatten() {
                assert_eq!(count, array.len());
            }
        }
        // Errors are fine, panics are not.
        let _ = (file.uint(key), file.float(key), file.boolean(key), file.string(key));
    }
    for t in file.tensors() {
        assert_eq!(file.tensor(&t.name), Some(t));
        assert_eq!(file.bytes(t).len() as u64, t.bytes);
        assert!(t.elements() > 0 && t.offset.is_multiple_of(file.alignment()));
        file.bytes(t).advise_random();
        file.bytes(t).willneed();
        let bytes = file.bytes(t);
        assert!(bytes.missing(1 << 12) <= bytes.len());
        bytes.page_in();
    }
    let again = Gguf::from_bytes(file.name(), rewrite(file)).unwrap();
    assert!(again.metadata().map(show).eq(file.metadata().map(show)));
    for (a, b) in again.tensors().iter().zip(file.tensors()) {
        assert_eq!((&a.name, a.type_id, a.shape()), (&b.name, b.type_id, b.shape()));
        assert_eq!(again.bytes(a)[..], file.bytes(b)[..]);
    }
}

/// A pair as text; unlike `==` this finds NaN equal to itself.
fn show((key, value): (&str, Value<'_>)) -> String {
    match value {
        Value::Array(array) => format!("{key} {:?} {:?}", array, array.raw()),
        Value::F32(x) => format!("{key} f32 {:08x}", x.to_bits()),
        Value::F64(x) => format!("{key} f64 {:016x}", x.to_bits()),
        other => format!("{key} {other:?}"),
    }
}

/// Opens damaged bytes: a refusal must be one line that names the file; what is accepted is examined.
pub fn open_damaged(bytes: Vec<u8>) -> Result<Gguf> {
    match Gguf::from_bytes("x.gguf", bytes) {
        Ok(file) => {
            examine(&file);
            Ok(file)
        }
        Err(e) => {
            let line = e.to_string();
            assert!(line.starts_with("x.gguf: ") && !line.chars().any(char::is_control), "{line}");
            assert!(matches!(e.kind(), Kind::Invalid | Kind::Unsupported), "{line}");
            Err(e)
        }
    }
}
