//! One request: a GET that follows redirects, as pieces of a body.
//!
//! A thread of its own sends it and reads the answer, so that whoever waits can be interrupted, and writing one piece goes on while the
//! next one arrives. At most [`REDIRECTS`] redirects are followed, none from https to http. The token is sent to the endpoint alone: not
//! to a host it redirects to, and not unencrypted, except to this computer.
//!
//! Not here: what is asked for, and what to do when it fails.

use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::Network;
use crate::registry::check_hex;
use crate::registry::store::interrupted;
use crate::{Error, Kind};

/// Redirects that are followed.
const REDIRECTS: usize = 5;
/// Bytes of a piece, at most.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be taken: what a crash loses.
const WAITING: usize = 2;
/// Between two looks whether to go on.
const LOOK: Duration = Duration::from_millis(50);
/// Longest wait a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// Whom to believe that a host is the one it says. Mozilla's list is built in.
#[derive(Debug, Clone)]
pub struct Authorities(RootCerts);

impl Default for Authorities {
    fn default() -> Authorities {
        Authorities(RootCerts::WebPki)
    }
}

impl Authorities {
    /// Those in a file of certificates in PEM, and no others.
    ///
    /// # Errors
    /// If the file cannot be read; [`Kind::Invalid`] if there is no certificate in it.
    pub fn read(path: &Path) -> Result<Authorities, Error> {
        let text = std::fs::read(path).map_err(|e| Error::io(path, &e))?;
        let certificates = parse_pem(&text).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        let certificates: Vec<_> = certificates.collect();
        match certificates.is_empty() {
            true => Err(Error::invalid(format!("{}: no certificate in it: expected PEM", path.display()))),
            false => Ok(Authorities(RootCerts::new_with_certs(&certificates))),
        }
    }
}

/// What went wrong, and whether it is worth another try.
#[derive(Debug)]
pub enum Failure {
    /// It may go away; the server may say when.
    Passing(Error, Option<Duration>),
    /// There is no way to the server.
    Unreachable(Error),
    /// It will not, or nobody wants to wait for it.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Final(error)
    }
}

/// What an answer says before its body.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// 200, or 206 if it is the range that was asked for.
    pub status: u16,
    /// Name of this version of the file, if it is a strong one.
    pub etag: Option<String>,
    /// Bytes of the body.
    pub length: Option<u64>,
    /// First and last byte of the range and size of the whole, of which each may be missing.
    pub range: (Option<(u64, u64)>, Option<u64>),
    /// SHA-256 and size of the whole file, as the endpoint knows them.
    pub sha256: Option<String>,
    pub bytes: Option<u64>,
}

/// An answer.
pub struct Answer {
    pub head: Head,
    pieces: Receiver<Message>,
}

enum Message {
    Head(Box<Head>),
    Piece(Vec<u8>),
    Failed(Failure),
    End,
}

impl Answer {
    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// If the connection breaks or nothing arrives for too long; [`Kind::Interrupted`] if `go_on` says so.
    pub fn next(&mut self, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<Option<Vec<u8>>, Failure> {
        match receive(&self.pieces, go_on)? {
            Message::Piece(piece) => Ok(Some(piece)),
            Message::Failed(failure) => Err(failure),
            Message::Head(_) | Message::End => Ok(None),
        }
    }

    /// The whole body, of at most `most` bytes.
    ///
    /// # Errors
    /// Those of [`Answer::next`], and if it is longer.
    pub fn body(&mut self, most: usize, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        while let Some(piece) = self.next(go_on)? {
            body.extend(piece);
            if body.len() > most {
                return Err(Error::invalid(format!("answer of more than {most} bytes: expected a short one")).into());
            }
        }
        Ok(body)
    }
}

fn receive(pieces: &Receiver<Message>, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<Message, Failure> {
    loop {
        if go_on().is_break() {
            return Err(interrupted().into());
        }
        match pieces.recv_timeout(LOOK) {
            Ok(message) => return Ok(message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(Message::End),
        }
    }
}

/// Asks for `path` of the endpoint, from byte `from` on and not beyond `to` where that is wanted, if the file is still the version `etag`.
///
/// # Errors
/// If there is no usable answer. The range not being there (416) and the whole file instead of it are answers.
pub fn get(
    network: &Network,
    path: &str,
    range: Option<(u64, Option<u64>)>,
    etag: Option<&str>,
    go_on: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Answer, Failure> {
    let address = format!("{}{path}", network.endpoint);
    let (sender, pieces) = sync_channel(WAITING);
    let (network, etag) = (network.clone(), etag.map(str::to_string));
    let work = move || {
        if let Err(failure) = exchange(&network, &address, range, etag.as_deref(), &sender) {
            let _ = sender.send(Message::Failed(failure));
        }
    };
    let spawned = std::thread::Builder::new().name("download".into()).spawn(work);
    spawned.map_err(|e| Error::new(Kind::Other, format!("cannot start a thread: {e}")))?;
    match receive(&pieces, go_on)? {
        Message::Head(head) => Ok(Answer { head: *head, pieces }),
        Message::Failed(failure) => Err(failure),
        Message::Piece(_) | Message::End => Err(Failure::Final(Error::new(Kind::Other, "no answer"))),
    }
}

fn exchange(
    network: &Network,
    address: &str,
    range: Option<(u64, Option<u64>)>,
    etag: Option<&str>,
    sender: &SyncSender<Message>,
) -> Result<(), Failure> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_resolve(Some(network.stall))
        .timeout_connect(Some(network.stall))
        .timeout_per_read(Some(network.stall))
        .timeout_per_write(Some(network.stall))
        .tls_config(TlsConfig::builder().root_certs(network.authorities.0.clone()).build())
        .accept_encoding("identity")
        .user_agent(concat!("gemrun/", env!("CARGO_PKG_VERSION")))
        .build();
    let agent = config.new_agent();
    let mut place =
        Place::parse(address).ok_or_else(|| Error::usage(format!("{address}: expected an http address")))?;
    let home = place.clone();
    let mut head = Head::default();
    for _ in 0..=REDIRECTS {
        let mut request = agent.get(&place.uri);
        if let Some(token) = network.token.as_ref().filter(|_| place.same_host(&home) && place.is_private()) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some((from, to)) = range {
            let to = to.map(|to| to.to_string()).unwrap_or_default();
            request = request.header("Range", format!("bytes={from}-{to}"));
        }
        if let Some(etag) = etag {
            request = request.header("If-Range", etag);
        }
        let answer = request.call().map_err(|e| failed(&place, &e))?;
        if place.same_host(&home) {
            let hash = text(answer.headers(), "x-linked-etag").map(|etag| etag.trim_matches('"').to_string());
            head.sha256 = hash.filter(|hash| check_hex("", hash, 64).is_ok()).or(head.sha256);
            head.bytes = number(answer.headers(), "x-linked-size").or(head.bytes);
        }
        match answer.status().as_u16() {
            200 | 206 | 416 => return body(answer, head, &place, sender),
            301 | 302 | 303 | 307 | 308 => place = place.redirected(&answer)?,
            _ => return Err(refused(&place, &answer, network)),
        }
    }
    Err(Error::new(Kind::Other, format!("{}: more than {REDIRECTS} redirects", home.host)).into())
}

fn body(answer: Response<Body>, head: Head, place: &Place, sender: &SyncSender<Message>) -> Result<(), Failure> {
    let headers = answer.headers();
    let head = Head {
        status: answer.status().as_u16(),
        etag: text(headers, "etag").filter(|etag| etag.starts_with('"')),
        length: number(headers, "content-length"),
        range: text(headers, "content-range").map_or((None, None), |range| content_range(&range)),
        ..head
    };
    let mut gone = sender.send(Message::Head(Box::new(head))).is_err();
    let mut reader = answer.into_body().into_reader();
    while !gone {
        // Not collected until it is full: a slow connection shows progress, and a crash loses little.
        let mut piece = vec![0; PIECE];
        let n = match reader.read(&mut piece) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Failure::Passing(network_error(place, &e.to_string()), None)),
        };
        piece.truncate(n);
        gone = sender.send(if n == 0 { Message::End } else { Message::Piece(piece) }).is_err() || n == 0;
    }
    Ok(())
}

/// An address, taken apart as far as it matters.
#[derive(Debug, Clone)]
struct Place {
    uri: Uri,
    secure: bool,
    host: String,
    port: u16,
}

impl Place {
    fn parse(address: &str) -> Option<Place> {
        let uri: Uri = address.parse().ok()?;
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = uri.host()?.to_ascii_lowercase();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Some(Place { uri, secure, host, port })
    }

    fn same_host(&self, other: &Place) -> bool {
        (self.secure, &self.host, self.port) == (other.secure, &other.host, other.port)
    }

    /// Whether nobody on the way reads what is sent there.
    fn is_private(&self) -> bool {
        self.secure || ["localhost", "127.0.0.1", "[::1]"].contains(&self.host.as_str())
    }

    /// Where an answer from here sends the request.
    fn redirected(&self, answer: &Response<Body>) -> Result<Place, Failure> {
        let location = text(answer.headers(), "location").unwrap_or_default();
        let address = match location.strip_prefix('/') {
            Some(rest) if rest.starts_with('/') => format!("{}:{location}", if self.secure { "https" } else { "http" }),
            Some(_) => {
                let authority = self.uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
                format!("{}://{authority}{location}", if self.secure { "https" } else { "http" })
            }
            None => location.clone(),
        };
        let next = Place::parse(&address).filter(|next| next.secure || !self.secure);
        next.ok_or_else(|| {
            let error = format!("{}: redirect to {location}: expected an https address", self.host);
            Error::new(Kind::Other, error).into()
        })
    }
}

/// A header that is text.
fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_string())
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.parse().ok()
}

/// `bytes 5-9/20`, `bytes */20`, `bytes 5-9/*`.
fn content_range(text: &str) -> (Option<(u64, u64)>, Option<u64>) {
    let Some((range, whole)) = text.strip_prefix("bytes ").and_then(|rest| rest.split_once('/')) else {
        return (None, None);
    };
    let range = range.split_once('-').and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
    (range.filter(|(from, to)| from <= to), whole.parse().ok())
}

/// An error of the connection. Certificates and the like do not change while somebody waits.
fn failed(place: &Place, error: &ureq::Error) -> Failure {
    use std::io::ErrorKind::{HostUnreachable, InvalidData, NetworkDown, NetworkUnreachable};
    let told = network_error(place, &error.to_string());
    match error {
        ureq::Error::HostNotFound => Failure::Unreachable(network_error(place, NOWHERE)),
        ureq::Error::Io(e) if e.to_string().contains("lookup") => Failure::Unreachable(network_error(place, NOWHERE)),
        ureq::Error::ConnectionFailed => Failure::Unreachable(told),
        ureq::Error::Io(e) => match e.kind() {
            NetworkUnreachable | HostUnreachable | NetworkDown => Failure::Unreachable(told),
            InvalidData => Failure::Final(told), // a certificate nobody vouches for
            _ => Failure::Passing(told, None),
        },
        ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => Failure::Passing(told, None),
        _ => Failure::Final(told),
    }
}

const NOWHERE: &str = "no such host, or no network";

fn network_error(place: &Place, what: &str) -> Error {
    let what = what.to_lowercase();
    let what = what.strip_prefix("io: ").unwrap_or(&what);
    Error::new(Kind::Other, format!("{}: {}", place.host, what.split(" (os error").next().unwrap_or_default()))
}

/// An answer that is none.
fn refused(place: &Place, answer: &Response<Body>, network: &Network) -> Failure {
    let (host, path, status) = (&place.host, place.uri.path(), answer.status());
    let error = |kind, what: &str| Error::new(kind, format!("{host}: {path}: {what}"));
    let wait = text(answer.headers(), "retry-after").and_then(|wait| wait.parse().ok()).map(Duration::from_secs);
    let wait = wait.map(|wait| wait.min(LONGEST_WAIT));
    match status.as_u16() {
        401 | 403 if network.token.is_none() => {
            let what = "not for everybody: accept its licence on the web site and set HF_TOKEN to an access token";
            Failure::Final(error(Kind::Other, what))
        }
        401 | 403 => Failure::Final(error(Kind::Other, "not for the owner of this HF_TOKEN: accept its licence first")),
        404 | 410 => Failure::Final(error(Kind::NotFound, "not there")),
        408 | 425 | 429 | 500..=599 => Failure::Passing(error(Kind::Other, &reason(status)), wait),
        _ => Failure::Final(error(Kind::Other, &reason(status))),
    }
}

/// `503 service unavailable`.
fn reason(status: StatusCode) -> String {
    let reason = status.canonical_reason().unwrap_or("").to_lowercase();
    format!("{} {reason}", status.as_u16()).trim_end().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_as_servers_write_them() {
        assert_eq!(content_range("bytes 5-9/20"), (Some((5, 9)), Some(20)));
        assert_eq!(content_range("bytes */20"), (None, Some(20)));
        assert_eq!(content_range("bytes 5-9/*"), (Some((5, 9)), None));
        for wrong in ["", "bytes", "bytes 9-5/20", "bytes -5-9/20", "items 5-9/20", "bytes 5-99999999999999999999/1"] {
            assert_eq!(content_range(wrong).0, None, "{wrong}");
        }
    }

    #[test]
    fn the_token_stays_at_home() {
        let place = |address| Place::parse(address).unwrap();
        let home = place("https://hub.example");
        for other in
            ["https://cdn.example", "https://hub.example:444", "http://hub.example", "https://hub.example.evil"]
        {
            assert!(!home.same_host(&place(other)), "{other}");
        }
        assert!(home.same_host(&place("https://HUB.example:443/x?y")));
        assert!(home.is_private() && place("http://127.0.0.1:80").is_private());
        assert!(!place("http://hub.example").is_private());
        assert!(Place::parse("ftp://hub.example").is_none() && Place::parse("/x").is_none());
    }

    #[test]
    fn redirects_do_not_lose_the_encryption() {
        let to = |from: &str, location: &str| {
            let answer = Response::builder().status(302).header("location", location).body(Body::builder().data(""));
            Place::parse(from).unwrap().redirected(&answer.unwrap()).map(|place| place.uri.to_string())
        };
        assert_eq!(to("https://a.b/c", "/d?e").unwrap(), "https://a.b/d?e");
        assert_eq!(to("https://a.b/c", "//d.e/f").unwrap(), "https://d.e/f");
        assert_eq!(to("http://a.b:81/c", "/d").unwrap(), "http://a.b:81/d");
        assert_eq!(to("http://a.b/c", "https://d/").unwrap(), "https://d/");
        for location in ["http://a.b/c", "d", "", "file:///etc/passwd"] {
            assert!(matches!(to("https://a.b/c", location), Err(Failure::Final(_))), "{location}");
        }
    }
}
