//! A cache as files: the keys and values of a token sequence, kept for later and found again in milliseconds.
//!
//! A file of keys and values says which tokens they belong to. Whoever wants to continue other tokens compares, takes the
//! beginning both have in common, and computes the rest: what is taken is right for any conversation that begins with those tokens.
//! What else keys and values depend on, the model and the rounding, is one [`Key`].
//!
//! ```text
//! FOLDER/kv.index    magic, version, key, generation, tokens, marks, one entry per record, XXH3 of all that
//! FOLDER/kv.N        generation N: records one after another
//! record             64 positions of all global layers, or of all sliding ones: keys, scales, values, scales, layer by layer
//! entry              class, live or dead, block of positions, XXH3 of the record
//! ```
//!
//! Saving appends the records that have changed, waits for the disk, and then replaces the index in one step: until then the old
//! index describes the old records, none of which has been touched. Records that nothing needs any more are dead; when they
//! outweigh the others, the living move to the file of a new generation. Restoring reads every record the index knows, dead ones
//! too, so no damaged byte goes unnoticed, and builds a new cache; the one in use is not touched.
//!
//! Sliding layers need the window before the position at which one goes on, and nothing older. So besides the end there are
//! *marks*, positions such as the ends of turns, whose windows are kept: there, too, the sequence can be cut and continued.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use super::{BLOCK, Block, Form, Kv, Layer, PANEL, Scale, Store};
use crate::new_file::NewFile;
use crate::{Error, Kind, Result};

const MAGIC: &[u8; 8] = b"gemrunKV";
/// Of the files' layout.
const VERSION: u32 = 1;
const INDEX: &str = "kv.index";
const DATA: &str = "kv.";
/// The newest marks that are kept, besides the first: each can cost a window of all sliding layers. A mark that follows another
/// within [`BLOCK`] positions is not worth it.
const NEWEST_MARKS: usize = 8;
/// Fewer dead bytes than this are never worth copying the others.
const LITTLE: u64 = 1 << 20;
/// An index has a few bytes per token; one larger than this was not written here.
const MAX_INDEX: u64 = 256 << 20;
const ENTRY: usize = 16;
const KEY: usize = 32;

/// What keys and values depend on, besides their tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key([u8; KEY]);

impl Key {
    /// Of a cache like `kv` filled by what `source` describes: the model, and the flags that change its numbers.
    pub fn new(source: &str, kv: &Kv) -> Key {
        let mut hash = Sha256::new();
        for part in [source, &kv.layout()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }
}

/// Which layers a record is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Global,
    Sliding,
}

const CLASSES: [Class; 2] = [Class::Global, Class::Sliding];

impl Class {
    fn has(self, layer: &Layer) -> bool {
        layer.sliding == (self == Class::Sliding)
    }
}

/// Keys and values of one class of layers at [`BLOCK`] positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    class: Class,
    block: usize,
    live: bool,
    hash: u64,
}

/// What is in the files of a folder.
#[derive(Debug, Clone)]
pub struct Saved {
    folder: PathBuf,
    key: Key,
    generation: u64,
    tokens: Vec<u32>,
    marks: Vec<usize>,
    records: Vec<Record>,
    /// Bytes of a record, by class.
    sizes: [usize; 2],
}

impl Kv {
    /// Everything about the cache that the meaning of stored bytes depends on.
    fn layout(&self) -> String {
        let form = |form: Form| match form {
            Form::F32 => "f32".to_string(),
            Form::F16 => "f16".to_string(),
            Form::I8(Scale::Dynamic) => "i8".to_string(),
            Form::I4(Scale::Dynamic) => "i4".to_string(),
            Form::I8(Scale::Static(scale)) => format!("i8*{:08x}", scale.to_bits()),
            Form::I4(Scale::Static(scale)) => format!("i4*{:08x}", scale.to_bits()),
        };
        let layers = self.layers.iter().enumerate().filter_map(|(il, layer)| Some((il, layer.as_ref()?)));
        let layers = layers.map(|(il, layer)| {
            let Layer { head_dim, kv_heads, sliding, .. } = layer;
            format!("{il}: {kv_heads}x{head_dim} {sliding} {} {}", form(layer.keys), form(layer.values))
        });
        format!("{BLOCK}/{PANEL}; {}", layers.collect::<Vec<_>>().join("; "))
    }

    /// Bytes of a record of each class.
    fn record_bytes(&self) -> [usize; 2] {
        CLASSES.map(|class| self.of_class(class).map(Layer::block_bytes).sum())
    }

    fn of_class(&self, class: Class) -> impl Iterator<Item = &Layer> {
        self.layers.iter().flatten().filter(move |layer| class.has(layer))
    }

    /// Appends the record of `block` to `out`.
    fn append_record(&self, class: Class, block: usize, out: &mut Vec<u8>) {
        for layer in self.of_class(class) {
            let block = &layer.blocks[layer.index(block * BLOCK)];
            block.keys.append_to(out);
            block.values.append_to(out);
        }
    }

    /// The blocks of sliding layers that are still there; none are needed where no layer slides.
    fn sliding_blocks(&self) -> std::ops::Range<usize> {
        let oldest = self.of_class(Class::Sliding).map(Layer::oldest).max().unwrap_or(0);
        oldest.div_ceil(BLOCK)..self.len.div_ceil(BLOCK)
    }
}

impl Store {
    fn append_to(&self, out: &mut Vec<u8>) {
        let floats =
            |out: &mut Vec<u8>, values: &[f32]| out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        match self {
            Store::F32(values) => floats(out, values),
            Store::F16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Store::I8(_, values, scales) => {
                out.extend(values.iter().map(|value| *value as u8));
                floats(out, scales);
            }
            Store::I4(_, values, scales) => {
                out.extend(values);
                floats(out, scales);
            }
        }
    }

    /// A store with nothing in it, not even zeros.
    fn hollow(form: Form) -> Store {
        match form {
            Form::F32 => Store::F32(Vec::new()),
            Form::F16 => Store::F16(Vec::new()),
            Form::I8(scale) => Store::I8(scale, Vec::new(), Vec::new()),
            Form::I4(scale) => Store::I4(scale, Vec::new(), Vec::new()),
        }
    }

    /// Fills a hollow store with what [`Store::append_to`] wrote of one.
    fn fill_from(&mut self, bytes: &[u8], scales: usize) -> Result<()> {
        let (values, scales) = match self {
            Store::F32(_) | Store::F16(_) => (bytes, &[][..]),
            Store::I8(..) | Store::I4(..) => bytes.split_at(bytes.len() - 4 * scales),
        };
        let float = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
        match self {
            Store::F32(store) => extend(store, values.as_chunks().0.iter().map(float)),
            Store::F16(store) => extend(store, values.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes))),
            Store::I8(_, store, factors) => {
                extend(store, values.iter().map(|byte| *byte as i8))?;
                extend(factors, scales.as_chunks().0.iter().map(float))
            }
            Store::I4(_, store, factors) => {
                extend(store, values.iter().copied())?;
                extend(factors, scales.as_chunks().0.iter().map(float))
            }
        }
    }

    fn is_hollow(&self) -> bool {
        match self {
            Store::F32(store) => store.is_empty(),
            Store::F16(store) => store.is_empty(),
            Store::I8(_, store, _) => store.is_empty(),
            Store::I4(_, store, _) => store.is_empty(),
        }
    }
}

/// Adds `values` to an empty vector, which gets just the memory for them.
fn extend<T>(store: &mut Vec<T>, values: impl ExactSizeIterator<Item = T>) -> Result<()> {
    store.try_reserve_exact(values.len()).map_err(|_| Error::new(Kind::Memory, "no memory left for the kv cache"))?;
    store.extend(values);
    Ok(())
}

/// How many tokens `a` and `b` begin with alike.
pub fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The first of some ascending marks and the newest ones, no two of them closer than a block.
fn apart(marks: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut kept: Vec<usize> = Vec::new();
    for mark in marks {
        if kept.last().is_none_or(|last| mark - last >= BLOCK) {
            kept.push(mark);
        }
    }
    kept.drain(1.min(kept.len())..kept.len().saturating_sub(NEWEST_MARKS).max(1.min(kept.len())));
    kept
}

/// The blocks with the positions that a token of a sliding layer at position `len` sees, itself left out.
fn window_blocks(len: usize, window: usize) -> std::ops::Range<usize> {
    len.saturating_sub(window - 1) / BLOCK..len.div_ceil(BLOCK)
}

fn index_path(folder: &Path) -> PathBuf {
    folder.join(INDEX)
}

/// Bytes of the files in `folder`, and when they were last used; `None` where there are none.
pub fn usage(folder: &Path) -> Option<(u64, std::time::SystemTime)> {
    let used = fs::metadata(index_path(folder)).and_then(|meta| meta.modified()).ok();
    let sizes = files(folder).into_iter().filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.len());
    let bytes = sizes.sum();
    (bytes > 0).then_some((bytes, used.unwrap_or(std::time::UNIX_EPOCH)))
}

/// The files in `folder` that are of this kind.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(DATA)).map(|entry| entry.path()).collect()
}

/// Removes the files in `folder`, the index first.
///
/// # Errors
/// [`Kind::Other`] if one cannot be removed.
pub fn remove(folder: &Path) -> Result<()> {
    let index = index_path(folder);
    for path in std::iter::once(index).chain(files(folder)) {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io(&path, &e)),
            _ => {}
        }
    }
    Ok(())
}

impl Saved {
    /// Reads which tokens the files in `folder` hold keys and values of, for a cache like `kv`. `None` if there are none.
    ///
    /// # Errors
    /// [`Kind::Invalid`], with the reason, if they are damaged, of another version, or made for another key.
    pub fn open(folder: &Path, key: &Key, kv: &Kv) -> Result<Option<Saved>> {
        let path = index_path(folder);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|file| file.take(MAX_INDEX).read_to_end(&mut bytes)) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return if files(folder).is_empty() { Ok(None) } else { Err(wrong(&path, "missing")) };
            }
            Err(e) => return Err(Error::io(&path, &e)),
            Ok(_) => {}
        }
        let mut fields = Fields::checked(&bytes).ok_or_else(|| wrong(&path, "damaged"))?;
        if fields.number(4) != Some(VERSION.into()) {
            return Err(wrong(&path, "made by another version of gemrun"));
        }
        if fields.take(KEY) != Some(&key.0) {
            return Err(wrong(&path, "made by another model, or with other settings"));
        }
        let sizes = kv.record_bytes();
        let saved = Saved::parse(folder, *key, sizes, fields).ok_or_else(|| wrong(&path, "damaged"))?;
        match fs::metadata(saved.data_path(saved.generation)) {
            Ok(meta) if meta.len() < saved.data_bytes() => {
                let missing = saved.data_bytes() - meta.len();
                Err(wrong(&saved.data_path(saved.generation), format!("cut short by {missing} bytes")))
            }
            Ok(_) => Ok(Some(saved)),
            Err(e) => Err(Error::io(&saved.data_path(saved.generation), &e)),
        }
    }

    fn parse(folder: &Path, key: Key, sizes: [usize; 2], mut fields: Fields) -> Option<Saved> {
        let generation = fields.number(8)?;
        let tokens = fields.numbers()?;
        let marks: Vec<usize> = fields.numbers()?.into_iter().map(|mark| mark as usize).collect();
        let entries = fields.number(4)? as usize;
        let entries = fields.take(entries.checked_mul(ENTRY)?)?;
        let record = |entry: &[u8; ENTRY]| {
            let mut fields = Fields(entry);
            let (class, live, block, hash) =
                (fields.number(1)?, fields.number(1)?, fields.number(6)?, fields.number(8)?);
            let class = *CLASSES.get(usize::try_from(class).ok()?)?;
            Some(Record { class, block: usize::try_from(block).ok()?, live: live == 1, hash })
        };
        let records = entries.as_chunks().0.iter().map(record).collect::<Option<Vec<Record>>>()?;
        let saved = Saved { folder: folder.to_path_buf(), key, generation, tokens, marks, records, sizes };
        let (blocks, mut seen) = (saved.tokens.len().div_ceil(BLOCK), BTreeSet::new());
        let sound = |record: &Record| record.block < blocks && seen.insert((record.class, record.block));
        let sound = saved.records.iter().filter(|record| record.live).all(sound);
        let globals = saved.live(Class::Global).count();
        let sound = sound && (globals == blocks || sizes[Class::Global as usize] == 0);
        (sound && fields.0.is_empty() && saved.marks.iter().all(|mark| *mark <= saved.tokens.len())).then_some(saved)
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Bytes of the records, dead ones included.
    fn data_bytes(&self) -> u64 {
        self.records.iter().map(|record| self.sizes[record.class as usize] as u64).sum()
    }

    fn data_path(&self, generation: u64) -> PathBuf {
        self.folder.join(format!("{DATA}{generation}"))
    }

    /// The blocks of live records of a class.
    fn live(&self, class: Class) -> impl Iterator<Item = usize> {
        self.records.iter().filter(move |record| record.live && record.class == class).map(|record| record.block)
    }

    /// The last position, at most `most`, at which the tokens can be cut and continued.
    pub fn reach(&self, most: usize, window: usize) -> usize {
        let mut len = most.min(self.tokens.len());
        if self.sizes[Class::Sliding as usize] == 0 {
            return len;
        }
        let there: BTreeSet<usize> = self.live(Class::Sliding).collect();
        while let Some(missing) = window_blocks(len, window).rev().find(|block| !there.contains(block)) {
            len = len.min(missing * BLOCK);
        }
        len
    }

    /// A new cache like `kv` with the first `len` tokens, a position that [`Saved::reach`] gave. All records are read and
    /// compared with their checksums.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if a record is damaged or missing, [`Kind::Usage`] if the cache is too small.
    pub fn restore(&self, kv: &Kv, len: usize, window: usize) -> Result<Kv> {
        if self.sizes != kv.record_bytes() || len > kv.context || self.reach(len, window) != len {
            return Err(wrong(&index_path(&self.folder), "does not hold what is asked of it"));
        }
        let mut new = kv.empty();
        let there: BTreeSet<usize> = self.live(Class::Sliding).collect();
        // The newest blocks without a gap, as many as a ring has.
        let blocks = len.div_ceil(BLOCK);
        let first_kept = |layer: &Layer| {
            let ring = if layer.ring > 0 { blocks.saturating_sub(layer.ring) } else { 0 };
            (ring..blocks).rev().take_while(|block| there.contains(block)).last().unwrap_or(blocks)
        };
        for layer in new.layers.iter_mut().flatten() {
            layer.written = len;
            layer.since = if layer.sliding { first_kept(layer) * BLOCK } else { 0 };
            let hollow = || Block { keys: Store::hollow(layer.keys), values: Store::hollow(layer.values) };
            layer.blocks = std::iter::repeat_with(hollow).take(layer.blocks(len)).collect();
        }
        self.read(&mut |record, bytes| match record.live && record.block < blocks {
            true => new.fill(record, bytes),
            false => Ok(()),
        })?;
        // What sliding layers do not need has not been kept.
        for layer in new.layers.iter_mut().flatten() {
            for i in 0..layer.blocks.len() {
                if layer.blocks[i].keys.is_hollow() {
                    layer.blocks[i] = layer.new_block()?;
                }
            }
        }
        new.len = len;
        // So that what is not used for long is found first when room is needed.
        let _ = File::open(index_path(&self.folder)).and_then(|file| file.set_modified(std::time::SystemTime::now()));
        Ok(new)
    }

    /// Reads all records in order, each compared with its checksum before `on` gets it.
    fn read(&self, on: &mut dyn FnMut(&Record, &[u8]) -> Result<()>) -> Result<()> {
        let path = self.data_path(self.generation);
        let mut file = File::open(&path).map_err(|e| Error::io(&path, &e))?;
        let mut buffer = vec![0; self.sizes.into_iter().max().unwrap_or(0)];
        for (i, record) in self.records.iter().enumerate() {
            let bytes = &mut buffer[..self.sizes[record.class as usize]];
            file.read_exact(bytes).map_err(|e| match e.kind() {
                ErrorKind::UnexpectedEof => wrong(&path, "cut short"),
                _ => Error::io(&path, &e),
            })?;
            if xxh3_64(bytes) != record.hash {
                return Err(wrong(&path, format!("record {i}: damaged")));
            }
            on(record, bytes)?;
        }
        Ok(())
    }

    /// Files in `folder` that hold nothing yet.
    pub fn empty(folder: &Path, key: &Key, kv: &Kv) -> Saved {
        let (sizes, folder) = (kv.record_bytes(), folder.to_path_buf());
        Saved { folder, key: *key, generation: 0, tokens: vec![], marks: vec![], records: vec![], sizes }
    }

    /// The same folder as if it held nothing yet, for a cache like `kv`.
    pub fn cleared(&self, kv: &Kv) -> Saved {
        Saved::empty(&self.folder, &self.key, kv)
    }

    /// Brings the files to what `kv` holds: keys and values of `tokens`, which is as many as the cache has or fewer. `marks` are added
    /// to the marks that still hold. A crash leaves what was there before.
    ///
    /// # Errors
    /// [`Kind::Other`] if the disk is full or fails.
    pub fn update(&mut self, kv: &Kv, tokens: &[u32], marks: &[usize], window: usize) -> Result<()> {
        let tokens = &tokens[..tokens.len().min(kv.len)];
        let (len, same) = (tokens.len(), common(&self.tokens, tokens));
        let marks = self.marks.iter().copied().filter(|mark| *mark <= same).chain(marks.iter().copied());
        let marks: BTreeSet<usize> = marks.filter(|mark| (1..=len).contains(mark)).collect();

        // What is there already, what only the cache has, and what a mark needs and nobody has.
        let mut next = Saved { tokens: tokens.to_vec(), marks: Vec::new(), ..self.clone() };
        let unchanged = |record: &Record| record.live && ((record.block + 1) * BLOCK).min(len) <= same;
        let old: BTreeSet<(Class, usize)> =
            self.records.iter().filter(|r| unchanged(r)).map(|r| (r.class, r.block)).collect();
        let (mut needed, held) = (BTreeSet::new(), kv.sliding_blocks());
        if self.sizes[Class::Global as usize] > 0 {
            needed.extend((0..len.div_ceil(BLOCK)).map(|block| (Class::Global, block)));
        }
        if self.sizes[Class::Sliding as usize] > 0 {
            let there = |block: &usize| held.contains(block) || old.contains(&(Class::Sliding, *block));
            let can_return = |mark: &usize| window_blocks(*mark, window).all(|block| there(&block));
            next.marks = apart(marks.into_iter().filter(can_return));
            let windows = next.marks.iter().flat_map(|mark| window_blocks(*mark, window));
            let recent = held.clone().filter(|block| *block < len.div_ceil(BLOCK));
            needed.extend(windows.chain(recent).map(|block| (Class::Sliding, block)));
        } else {
            next.marks = apart(marks.into_iter());
        }
        if self.generation > 0 && same == len && self.tokens.len() == len && next.marks == self.marks {
            return Ok(());
        }
        for record in &mut next.records {
            record.live = unchanged(record) && needed.contains(&(record.class, record.block));
        }
        let new: Vec<(Class, usize)> = needed.into_iter().filter(|record| !old.contains(record)).collect();

        let bytes = |live: bool| -> u64 {
            let records = next.records.iter().filter(|record| record.live == live);
            records.map(|record| self.sizes[record.class as usize] as u64).sum()
        };
        let added: u64 = new.iter().map(|(class, _)| self.sizes[*class as usize] as u64).sum();
        if self.generation == 0 || bytes(false) > (bytes(true) + added).max(LITTLE) {
            next.rewrite(self)?;
        }
        next.append(kv, &new)?;
        next.write_index()?;
        for path in files(&self.folder) {
            let current = path == next.data_path(next.generation) || path == index_path(&self.folder);
            if !current {
                let _ = fs::remove_file(path);
            }
        }
        *self = next;
        Ok(())
    }

    /// Moves the live records to the file of a new generation.
    fn rewrite(&mut self, old: &Saved) -> Result<()> {
        self.generation = old.generation.wrapping_add(1);
        while self.data_path(self.generation).exists() {
            self.generation = self.generation.wrapping_add(1);
        }
        let path = self.data_path(self.generation);
        let mut file = File::create(&path).map_err(|e| Error::io(&path, &e))?;
        let (mut live, mut records) = (Vec::new(), self.records.iter());
        if !old.records.is_empty() {
            // The records are the same, but fewer of them are live.
            old.read(&mut |_, bytes| {
                if let Some(record) = records.next().filter(|record| record.live) {
                    file.write_all(bytes).map_err(|e| Error::io(&path, &e))?;
                    live.push(*record);
                }
                Ok(())
            })?;
        }
        self.records = live;
        Ok(())
    }

    /// Writes records of `kv` behind those there are, and waits for the disk.
    fn append(&mut self, kv: &Kv, new: &[(Class, usize)]) -> Result<()> {
        let path = self.data_path(self.generation);
        let failed = |e: std::io::Error| Error::io(&path, &e);
        let mut file = File::options().write(true).open(&path).map_err(failed)?;
        // What an unfinished save left behind is cut off.
        let end = self.data_bytes();
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(failed)?;
        let mut buffer = Vec::new();
        for (class, block) in new {
            buffer.clear();
            kv.append_record(*class, *block, &mut buffer);
            file.write_all(&buffer).map_err(failed)?;
            self.records.push(Record { class: *class, block: *block, live: true, hash: xxh3_64(&buffer) });
        }
        file.sync_data().map_err(failed)
    }

    fn write_index(&self) -> Result<()> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.key.0);
        bytes.extend(self.generation.to_le_bytes());
        let marks: Vec<u32> = self.marks.iter().map(|mark| *mark as u32).collect();
        for numbers in [&self.tokens, &marks] {
            bytes.extend((numbers.len() as u32).to_le_bytes());
            bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        bytes.extend((self.records.len() as u32).to_le_bytes());
        for record in &self.records {
            bytes.extend([record.class as u8, record.live.into()]);
            bytes.extend(&(record.block as u64).to_le_bytes()[..6]);
            bytes.extend(record.hash.to_le_bytes());
        }
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        let path = index_path(&self.folder);
        let mut file = NewFile::create(&path)?;
        file.write_all(&bytes).map_err(|e| Error::io(file.part(), &e))?;
        file.finish()
    }
}

impl Kv {
    /// An empty cache of the same kind.
    fn empty(&self) -> Kv {
        let layer = |layer: &Option<Layer>| {
            layer.as_ref().map(|layer| Layer {
                order: layer.order.clone(),
                blocks: Vec::new(),
                written: 0,
                since: 0,
                ..*layer
            })
        };
        Kv { kind: self.kind, context: self.context, len: 0, layers: self.layers.iter().map(layer).collect() }
    }

    /// Puts a record where it belongs in a cache that has room for it. Blocks a ring no longer holds are left out.
    fn fill(&mut self, record: &Record, mut bytes: &[u8]) -> Result<()> {
        for layer in self.layers.iter_mut().flatten().filter(|layer| record.class.has(layer)) {
            let (this, rest) = bytes.split_at(layer.block_bytes());
            bytes = rest;
            if record.block * BLOCK < layer.oldest() {
                continue;
            }
            let index = layer.index(record.block * BLOCK);
            let scales = layer.kv_heads * BLOCK;
            let (keys, values) = this.split_at(layer.kv_heads * layer.keys.bytes(layer.key_elements(), BLOCK));
            let block = &mut layer.blocks[index];
            block.keys.fill_from(keys, scales)?;
            block.values.fill_from(values, scales)?;
        }
        Ok(())
    }
}

fn wrong(path: &Path, what: impl AsRef<str>) -> Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Error::invalid(format!("{name}: {}", what.as_ref()))
}

/// Reads an index from front to back.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The fields behind the magic of an index whose checksum is right.
    fn checked(bytes: &'a [u8]) -> Option<Fields<'a>> {
        let (content, hash) = bytes.split_last_chunk()?;
        let right = xxh3_64(content) == u64::from_le_bytes(*hash);
        Some(Fields(content.strip_prefix(MAGIC)?)).filter(|_| right)
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of `bytes` bytes.
    fn number(&mut self, bytes: usize) -> Option<u64> {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(self.take(bytes)?);
        Some(u64::from_le_bytes(number))
    }

    /// How many, then the numbers.
    fn numbers(&mut self) -> Option<Vec<u32>> {
        let count = self.number(4)? as usize;
        let bytes = self.take(count.checked_mul(4)?)?;
        Some(bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }
}
