//! A hub in the test: serves one file by HTTP from this process, as faithfully or badly as told, and counts what it sends.
//!
//! A request is answered by the next [`Fault`] of the list; when the list is used up, rightly. It knows ranges, `If-Range`
//! and ETags, and the two addresses that are asked for: the file, and the list of a repository's files.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// How a request is answered.
#[derive(Clone, Debug)]
pub enum Fault {
    /// As it should be.
    None,
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The connection ends before an answer.
    Hang,
    /// So many bytes of the body, then nothing for a long time.
    Stall(usize),
    /// A range is refused with 416.
    NoRange,
    /// The whole file, whatever was asked for.
    Whole,
    /// A 206 that begins elsewhere than asked.
    OtherRange,
    /// Another file from now on, of another version.
    NewVersion,
    /// Another file from now on, whose version is called as before.
    Swapped,
    /// One byte of the body is another.
    WrongByte(usize),
    /// Only so many bytes, and called the whole file.
    Short(usize),
    /// An error, with Retry-After if it is some.
    Status(u16, Option<u64>),
    /// To an address, absolute or not.
    Redirect(String),
    /// In small pieces with pauses between.
    Slow,
    /// Neither a length nor a version is told.
    Bare,
}

/// What a request was.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub path: String,
    pub range: Option<String>,
    pub if_range: Option<String>,
    pub token: Option<String>,
}

/// What is done at a certain time.
type Act = Box<dyn FnMut() + Send>;

struct State {
    bytes: Mutex<Arc<Vec<u8>>>,
    version: AtomicU64,
    faults: Mutex<Vec<Fault>>,
    seen: Mutex<Vec<Seen>>,
    /// Bytes of bodies that went into sockets.
    sent: AtomicU64,
    /// Called when so many have been.
    at: Mutex<Option<(u64, Act)>>,
    /// What the hub says of the file: its SHA-256 as `X-Linked-ETag`.
    linked: Mutex<Option<String>>,
    /// Answer to a request for the list of files.
    list: Mutex<String>,
    /// Microseconds between two pieces of a body.
    pause: AtomicU64,
    stop: AtomicBool,
}

/// The hub. Stops when it is dropped.
pub struct Hub {
    pub address: String,
    state: Arc<State>,
}

impl Hub {
    pub fn new(bytes: Vec<u8>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            bytes: Mutex::new(Arc::new(bytes)),
            version: AtomicU64::new(1),
            faults: Mutex::default(),
            seen: Mutex::default(),
            sent: AtomicU64::new(0),
            at: Mutex::default(),
            linked: Mutex::default(),
            list: Mutex::new("[]".into()),
            pause: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let (state, Ok(stream)) = (Arc::clone(&shared), stream) else { continue };
                thread::spawn(move || while let Some(true) = answer(&state, &stream) {});
            }
        });
        Hub { address, state }
    }

    /// How the next requests are answered.
    pub fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        *self.state.faults.lock().unwrap() = faults.into_iter().collect();
    }

    /// The SHA-256 that the hub tells.
    pub fn linked(&self, sha256: &str) {
        *self.state.linked.lock().unwrap() = Some(sha256.to_string());
    }

    /// Sends as fast as a network does, not a socket: 64 KiB each so many microseconds.
    pub fn pace(&self, microseconds: u64) {
        self.state.pause.store(microseconds, Ordering::SeqCst);
    }

    pub fn list(&self, json: &str) {
        *self.state.list.lock().unwrap() = json.to_string();
    }

    pub fn replace(&self, bytes: Vec<u8>) {
        *self.state.bytes.lock().unwrap() = Arc::new(bytes);
        self.state.version.fetch_add(1, Ordering::SeqCst);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Bytes of bodies since the last time this was asked.
    pub fn sent(&self) -> u64 {
        self.state.sent.swap(0, Ordering::SeqCst)
    }

    /// Has `act` called once, when `bytes` have been sent.
    pub fn when_sent(&self, bytes: u64, act: impl FnMut() + Send + 'static) {
        *self.state.at.lock().unwrap() = Some((bytes, Box::new(act)));
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address.strip_prefix("http://").unwrap());
    }
}

/// Answers one request; whether the connection goes on.
fn answer(state: &State, mut stream: &TcpStream) -> Option<bool> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
    let mut words = line.split(' ');
    let tunnel = words.next() == Some("CONNECT");
    let mut seen = Seen { path: words.next()?.to_string(), ..Seen::default() };
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok().filter(|&n| n > 0)?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        let value = Some(value.to_string());
        match name.to_ascii_lowercase().as_str() {
            "range" => seen.range = value,
            "if-range" => seen.if_range = value,
            "authorization" => seen.token = value,
            _ => {}
        }
    }
    state.seen.lock().unwrap().push(seen.clone());
    if tunnel {
        // As a proxy it leads to itself.
        return stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok().map(|()| true);
    }
    if seen.path.starts_with("/api/") {
        let list = state.list.lock().unwrap().clone();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", list.len());
        return stream.write_all((head + &list).as_bytes()).ok().map(|()| true);
    }

    let fault = {
        let mut faults = state.faults.lock().unwrap();
        if faults.is_empty() { Fault::None } else { faults.remove(0) }
    };
    match &fault {
        Fault::NewVersion | Fault::Swapped => {
            let mut bytes = state.bytes.lock().unwrap();
            *bytes = Arc::new(bytes.iter().map(|b| b ^ 1).collect());
            if matches!(fault, Fault::NewVersion) {
                state.version.fetch_add(1, Ordering::SeqCst);
            }
        }
        Fault::Hang => return None,
        _ => {}
    }
    let bytes = Arc::clone(&state.bytes.lock().unwrap());
    let etag = format!("\"v{}\"", state.version.load(Ordering::SeqCst));
    let wanted = seen.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let wanted = wanted.map(|(from, to)| (from.parse().unwrap(), to.parse().map_or(bytes.len(), |to: usize| to + 1)));
    let same = seen.if_range.as_ref().is_none_or(|asked| *asked == etag);
    let whole = matches!(fault, Fault::Whole | Fault::Short(_) | Fault::Bare);
    let mut head = String::new();
    let (status, (mut from, to)) = match wanted.filter(|_| same && !whole) {
        Some((from, _)) if from >= bytes.len() || matches!(fault, Fault::NoRange) => {
            head += &format!("Content-Range: bytes */{}\r\n", bytes.len());
            (416, (0, 0))
        }
        Some((from, to)) => (206, (from, to.min(bytes.len()))),
        None => (200, (0, bytes.len())),
    };
    if matches!(fault, Fault::OtherRange) {
        from /= 2;
    }
    if status == 206 {
        head += &format!("Content-Range: bytes {from}-{}/{}\r\n", to - 1, bytes.len());
    }
    let mut body = bytes[from..to].to_vec();
    let mut status = status;
    match &fault {
        Fault::Status(error, wait) => {
            (status, body) = (*error, b"no".to_vec());
            head += &wait.map(|wait| format!("Retry-After: {wait}\r\n")).unwrap_or_default();
        }
        Fault::Redirect(location) => {
            (status, body) = (302, Vec::new());
            head += &format!("Location: {location}\r\n");
        }
        Fault::WrongByte(at) => body[*at] ^= 0x40,
        Fault::Short(len) => body.truncate(*len),
        _ => {}
    }
    if let Some(sha256) = state.linked.lock().unwrap().as_ref() {
        head += &format!("X-Linked-ETag: \"{sha256}\"\r\nX-Linked-Size: {}\r\n", bytes.len());
    }
    if matches!(fault, Fault::Bare) {
        head += "Connection: close\r\n";
    } else {
        head += &format!("ETag: {etag}\r\nContent-Length: {}\r\n", body.len());
    }
    stream.write_all(format!("HTTP/1.1 {status} X\r\n{head}\r\n").as_bytes()).ok()?;
    let cut = match fault {
        Fault::Cut(n) | Fault::Stall(n) => n.min(body.len()),
        _ => body.len(),
    };
    let piece = if matches!(fault, Fault::Slow) { body.len() / 20 + 1 } else { 64 << 10 };
    for piece in body[..cut].chunks(piece) {
        thread::sleep(Duration::from_micros(state.pause.load(Ordering::SeqCst)));
        if matches!(fault, Fault::Slow) {
            thread::sleep(Duration::from_millis(20));
        }
        stream.write_all(piece).ok()?;
        let sent = state.sent.fetch_add(piece.len() as u64, Ordering::SeqCst) + piece.len() as u64;
        let mut at = state.at.lock().unwrap();
        if at.as_ref().is_some_and(|(bytes, _)| sent >= *bytes)
            && let Some((_, mut act)) = at.take()
        {
            act();
        }
    }
    match fault {
        Fault::Stall(_) => {
            thread::sleep(Duration::from_secs(5));
            None
        }
        Fault::Cut(_) | Fault::Bare => {
            let _ = stream.shutdown(Shutdown::Both);
            None
        }
        _ => Some(true),
    }
}
