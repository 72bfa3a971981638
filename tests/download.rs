//! Downloads against a hub with faults: every one ends with the right file or with one clear error, and nothing wrong
//! ever has the file's name.
//!
//! These call the library, with short pauses; `pull.rs` runs the program.

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::bytes::{flip, noise, sha256};
use common::hub::{Fault, Hub};
use gemrun::registry::Remote;
use gemrun::registry::download::{Authorities, Event, Network, Outcome, fetch};
use gemrun::registry::store::{self, Record, SPAN, Verdict};
use gemrun::{Error, Kind};

/// A hub, a place for its file, and what is known of the file.
struct Setting {
    hub: Hub,
    folder: tempfile::TempDir,
    remote: Remote,
    network: Network,
}

impl Setting {
    fn new(bytes: &[u8]) -> Setting {
        let hub = Hub::new(bytes.to_vec());
        let network = Network {
            endpoint: hub.address.clone(),
            token: None,
            authorities: Authorities::default(),
            stall: Duration::from_secs(10),
            tries: 3,
            pause: Duration::from_millis(2),
        };
        let remote =
            Remote { bytes: Some(bytes.len() as u64), sha256: Some(sha256(bytes)), ..Remote::new("me/mine", "x.gguf") };
        Setting { hub, folder: tempfile::tempdir().unwrap(), remote, network }
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("x.gguf")
    }

    /// Has the hub answer so. A busy computer is not to be taken for a stalled connection, so only where one is meant to stall
    /// it is given up soon.
    fn meet(&mut self, faults: Vec<Fault>) {
        if faults.iter().any(|fault| matches!(fault, Fault::Stall(_))) {
            self.network.stall = Duration::from_secs(1);
        }
        self.hub.faults(faults);
    }

    /// What there is of the file while it is not whole.
    fn part(&self) -> Vec<u8> {
        fs::read(store::part(&self.target())).unwrap_or_default()
    }

    /// Downloads. Whatever has the file's name, at any time, must be `right`.
    fn fetch(&self, right: &[u8]) -> Result<Outcome, Error> {
        let target = self.target();
        let outcome = fetch(&self.network, &self.remote, &target, &mut |_| {
            assert!(!target.exists() || fs::read(&target).unwrap() == right, "something wrong has the file's name");
            ControlFlow::Continue(())
        });
        match &outcome {
            Ok(_) => {
                assert!(fs::read(&target).unwrap() == right);
                assert_eq!(names(self.folder.path()), ["x.gguf", "x.gguf.json"], "nothing is left over");
                assert!(Record::read(&target).unwrap().untouched(&target));
            }
            Err(error) => {
                assert!(!target.exists(), "an error, and a file: {error}");
                assert!(!names(self.folder.path()).contains(&"x.gguf.lock".into()));
                assert!(!error.to_string().contains('\n'));
            }
        }
        outcome
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn faults_that_pass() {
    let bytes = noise(1_000_000, 1);
    let redirect = || Fault::Redirect("/elsewhere/x.gguf".into());
    let cases: Vec<(&str, Vec<Fault>)> = vec![
        ("none", vec![]),
        ("cut", vec![Fault::Cut(333_333)]),
        ("cut at once, cut again", vec![Fault::Cut(0), Fault::Cut(1), Fault::Cut(999_998)]),
        ("cut, then 416", vec![Fault::Cut(500_000), Fault::NoRange]),
        ("cut, then the whole file", vec![Fault::Cut(500_000), Fault::Whole]),
        ("cut, then a range from elsewhere", vec![Fault::Cut(500_000), Fault::OtherRange]),
        (
            "cut, errors, cut",
            vec![Fault::Cut(1000), Fault::Status(503, None), Fault::Status(429, Some(0)), Fault::Cut(9)],
        ),
        ("stall", vec![Fault::Stall(400_000)]),
        ("no answer", vec![Fault::Hang, Fault::Hang]),
        ("five redirects", vec![redirect(), redirect(), redirect(), redirect(), redirect()]),
        ("redirect, cut", vec![redirect(), Fault::Cut(70_000)]),
        ("slow", vec![Fault::Slow]),
        ("no length, no version", vec![Fault::Bare]),
        ("a wrong byte in what is continued later", vec![Fault::Cut(500_000), Fault::WrongByte(7)]),
    ];
    for (what, faults) in cases {
        let mut setting = Setting::new(&bytes);
        setting.meet(faults);
        let begun = Instant::now();
        // A byte that was wrong on the way is found at the end. It may have come from a part of long ago: once more.
        let outcome = match setting.fetch(&bytes) {
            Err(error) if what.starts_with("a wrong byte") => {
                assert_eq!(error.kind(), Kind::Invalid, "{error}");
                assert!(names(setting.folder.path()).is_empty(), "a wrong part is kept");
                setting.fetch(&bytes)
            }
            other => other,
        };
        match outcome {
            Ok(Outcome::Fetched(_)) => {}
            other => panic!("{what}: {other:?} after {:?}", begun.elapsed()),
        }
        assert_eq!(setting.fetch(&bytes).unwrap(), Outcome::Present, "{what}");
    }
}

#[test]
fn faults_that_stay() {
    let bytes = noise(300_000, 2);
    let many = |fault: Fault| vec![fault; 20];
    let cases: Vec<(&str, Vec<Fault>, Kind, &str)> = vec![
        ("503", many(Fault::Status(503, None)), Kind::Other, "503 service unavailable"),
        ("no answer", many(Fault::Hang), Kind::Other, "127.0.0.1: "),
        ("stalls", many(Fault::Stall(0)), Kind::Other, "127.0.0.1: "),
        ("404", many(Fault::Status(404, None)), Kind::NotFound, "/me/mine/resolve/main/x.gguf: not there"),
        ("401", many(Fault::Status(401, None)), Kind::Other, "HF_TOKEN"),
        ("418", many(Fault::Status(418, None)), Kind::Other, "418"),
        ("six redirects", many(Fault::Redirect("/x".into())), Kind::Other, "more than 5 redirects"),
        ("nowhere", many(Fault::Redirect("file:///etc/passwd".into())), Kind::Other, "redirect to file:///etc/passwd"),
        ("wrong byte", many(Fault::WrongByte(150_000)), Kind::Invalid, "expected 300000 with"),
        ("shorter", many(Fault::Short(200_000)), Kind::Invalid, "200000 bytes: expected 300000"),
        ("escape", many(Fault::Redirect("file:///\u{1b}[2J".into())), Kind::Other, "127.0.0.1: "),
    ];
    for (what, faults, kind, part) in cases {
        let mut setting = Setting::new(&bytes);
        setting.meet(faults);
        let error = setting.fetch(&bytes).expect_err(what);
        assert!(error.kind() == kind && error.to_string().contains(part), "{what}: {error}");
        assert!(!error.to_string().contains('\u{1b}'));
        let left = names(setting.folder.path());
        assert!(left.is_empty() || !setting.part().is_empty(), "{what}: nothing was fetched, and {left:?} is left");
    }
}

/// Each of many downloads meets up to four faults chosen by chance; `GEMRUN_FAULTS=1000` makes them that many.
#[test]
fn faults_by_chance() {
    let downloads = std::env::var("GEMRUN_FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let bytes = noise(700_000, 3);
    let mut chance =
        noise(8 * 20 * downloads, 4).chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    let mut next = |below: usize| (chance.pop().unwrap() % below as u64) as usize;
    let (mut right, mut wrong) = (0, 0);
    for i in 0..downloads {
        let setting = Setting::new(&bytes);
        let faults: Vec<Fault> = (0..next(5))
            .map(|_| match next(10) {
                0..4 => Fault::Cut(next(700_000)),
                4 => Fault::NoRange,
                5 => Fault::Whole,
                6 => Fault::OtherRange,
                7 => Fault::Status(500, None),
                8 => Fault::WrongByte(0),
                _ => Fault::Hang,
            })
            .collect();
        setting.hub.faults(faults.clone());
        match setting.fetch(&bytes) {
            Ok(_) => right += 1,
            Err(error) => {
                assert!([Kind::Invalid, Kind::Other].contains(&error.kind()), "{i}: {faults:?}: {error}");
                wrong += 1;
                setting.hub.faults([]);
                assert!(matches!(setting.fetch(&bytes), Ok(Outcome::Fetched(_))), "{i}: {faults:?}: then no fault");
            }
        }
    }
    println!("{right} right at once, {wrong} after one error");
    assert!(right > downloads / 2 && wrong > 0, "{right} right, {wrong} wrong");
}

#[test]
fn another_version_is_not_spliced() {
    let bytes = noise(400_000, 5);
    let new: Vec<u8> = bytes.iter().map(|b| b ^ 1).collect();
    // Nothing is known of the file but what the hub says, so the new version is as good as the old one.
    for faults in [
        vec![Fault::Cut(200_000), Fault::NewVersion],
        vec![Fault::Cut(200_000), Fault::NewVersion, Fault::Cut(100_000)],
    ] {
        let mut setting = Setting::new(&bytes);
        (setting.remote.sha256, setting.remote.bytes) = (None, None);
        setting.hub.faults(faults);
        setting.fetch(&new).unwrap();
        let seen = setting.hub.seen();
        assert_eq!((seen[1].range.as_deref(), seen[1].if_range.as_deref()), (Some("bytes=200000-"), Some("\"v1\"")));
    }
    // The version is called as before, and the sum of the whole tells.
    let setting = Setting::new(&bytes);
    setting.hub.faults([Fault::Cut(200_000), Fault::Swapped]);
    let error = setting.fetch(&bytes).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
    // What the hub itself says of the file is compared, too, before anything is fetched.
    let setting = Setting::new(&bytes);
    setting.hub.linked(&sha256(&new));
    let error = setting.fetch(&bytes).unwrap_err().to_string();
    assert!(error.starts_with("x.gguf: the repository has another upload: sha256"), "{error}");
    assert!(error.ends_with("gemrun pull hf:me/mine:x.gguf@main takes it as it is"), "{error}");
    assert_eq!(setting.hub.seen().len(), 1);
    // And it is enough where nothing else is known.
    let mut setting = Setting::new(&bytes);
    setting.remote.sha256 = None;
    setting.hub.linked(&sha256(&bytes));
    setting.hub.faults(vec![Fault::WrongByte(9); 5]);
    assert_eq!(setting.fetch(&bytes).unwrap_err().kind(), Kind::Invalid);
    setting.hub.faults([]);
    setting.fetch(&bytes).unwrap();
}

#[test]
fn the_token_goes_to_the_endpoint_alone() {
    let bytes = noise(100_000, 6);
    let (mut setting, other) = (Setting::new(&bytes), Hub::new(bytes.clone()));
    setting.network.token = Some("secret".into());
    // The other host, by another name and port; back, and there again.
    let away = other.address.replace("127.0.0.1", "localhost");
    setting.hub.faults([Fault::Redirect("/here".into()), Fault::Redirect(format!("{away}/there"))]);
    other.faults([Fault::Redirect(format!("{}/back", setting.hub.address))]);
    setting.fetch(&bytes).unwrap();
    let tokens = |hub: &Hub| hub.seen().iter().map(|seen| (seen.path.clone(), seen.token.clone())).collect::<Vec<_>>();
    let bearer = Some("Bearer secret".to_string());
    let paths = ["/me/mine/resolve/main/x.gguf", "/here", "/back"];
    assert_eq!(tokens(&setting.hub), paths.map(|path| (path.to_string(), bearer.clone())));
    assert_eq!(tokens(&other), [("/there".to_string(), None)]);
}

#[test]
fn a_part_is_continued_where_it_ended() {
    let bytes = noise(40_000_000, 7);
    let setting = Setting::new(&bytes);
    setting.hub.faults(vec![Fault::Cut(25_000_000), Fault::Hang, Fault::Hang, Fault::Hang]);
    let error = setting.fetch(&bytes).unwrap_err();
    assert_eq!(error.kind(), Kind::Other);
    assert_eq!(names(setting.folder.path()), ["x.gguf.part", "x.gguf.part.json"]);
    let first = setting.hub.sent();
    // A byte of what is there is damaged meanwhile. Its span alone is fetched again.
    let part = setting.folder.path().join("x.gguf.part");
    flip(&part, 5_000_000);
    setting.fetch(&bytes).unwrap();
    let (second, span) = (setting.hub.sent(), SPAN);
    assert_eq!((first, second), (25_000_000, 15_000_000 + span));
    // A part of another start of the computer is trusted up to the last span that was on the disk.
    let setting = Setting::new(&bytes);
    setting.hub.faults(vec![Fault::Cut(25_000_000), Fault::Hang, Fault::Hang, Fault::Hang]);
    setting.fetch(&bytes).unwrap_err();
    let mut record = Record::read(&setting.folder.path().join("x.gguf.part")).unwrap();
    assert_eq!(record.spans.len(), 1);
    record.boot = Some("another".into());
    record.write(&setting.folder.path().join("x.gguf.part")).unwrap();
    setting.hub.sent();
    setting.fetch(&bytes).unwrap();
    assert_eq!(setting.hub.sent(), 40_000_000 - span);
}

#[test]
fn what_is_there_is_looked_at_first() {
    let bytes = noise(100_000, 8);
    // Put there by hand, and right: nothing is fetched.
    let setting = Setting::new(&bytes);
    fs::write(setting.target(), &bytes).unwrap();
    assert_eq!(setting.fetch(&bytes).unwrap(), Outcome::Present);
    assert_eq!(setting.hub.seen().len(), 0);
    // Another file: it is somebody's, so it stays.
    let setting = Setting::new(&bytes);
    fs::write(setting.target(), b"mine").unwrap();
    let error =
        fetch(&setting.network, &setting.remote, &setting.target(), &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.kind() == Kind::Invalid && error.to_string().ends_with("remove or rename it"), "{error}");
    assert_eq!(fs::read(setting.target()).unwrap(), b"mine");
    // An earlier upload is replaced when the newer one is complete, and not before.
    let mut setting = Setting::new(&bytes);
    let old = noise(90_000, 9);
    fs::write(setting.target(), &old).unwrap();
    setting.remote.supersedes = vec![sha256(&old)];
    setting.hub.faults(vec![Fault::Cut(50_000); 1]);
    let target = setting.target();
    fetch(&setting.network, &setting.remote, &target, &mut |_| {
        assert!([&old, &bytes].contains(&&fs::read(&target).unwrap()));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(fs::read(&target).unwrap(), bytes);
    // A file of another size than the record's: what is missing, or too much, is put right.
    for len in [60_000, 130_000] {
        let setting = Setting::new(&bytes);
        setting.fetch(&bytes).unwrap();
        fs::File::options().write(true).open(setting.target()).unwrap().set_len(len).unwrap();
        let again = fetch(&setting.network, &setting.remote, &setting.target(), &mut |_| ControlFlow::Continue(()));
        assert!(matches!(again, Ok(Outcome::Repaired(..))), "{again:?}");
        assert_eq!(fs::read(setting.target()).unwrap(), bytes);
    }
}

#[test]
fn a_download_can_be_interrupted_at_any_time() {
    let bytes = noise(2_000_000, 10);
    for stop_after in [0, 1, 5, 12, 40] {
        let mut setting = Setting::new(&bytes);
        setting.meet(vec![Fault::Cut(600_000), Fault::Stall(10)]);
        let mut events = 0;
        let begun = Instant::now();
        let result = fetch(&setting.network, &setting.remote, &setting.target(), &mut |event| {
            events += usize::from(!matches!(event, Event::Waiting));
            if events > stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        if let Err(error) = result {
            assert_eq!(error.kind(), Kind::Interrupted, "{error}");
            assert!(!setting.target().exists());
        }
        assert!(begun.elapsed() < Duration::from_secs(30));
        setting.fetch(&bytes).unwrap();
    }
}

#[test]
fn a_flipped_byte_in_200_megabytes_costs_one_span() {
    let bytes = noise(200_000_000, 11);
    let setting = Setting::new(&bytes);
    setting.fetch(&bytes).unwrap();
    setting.hub.sent();
    let target = setting.target();
    flip(&target, 123_456_789);
    let (verdict, record) =
        store::verify(&target, Some(&setting.remote), &mut |_, _| ControlFlow::Continue(())).unwrap();
    let start = 123_456_789 / SPAN * SPAN;
    let span = start..start + SPAN;
    assert_eq!(verdict, Verdict::Damaged(vec![span.clone()]));
    record.write(&target).unwrap();
    assert_eq!(setting.fetch_repair(), Outcome::Repaired(vec![span.clone()], SPAN));
    assert!(fs::read(&target).unwrap() == bytes);
    assert_eq!(setting.hub.sent(), SPAN);
}

/// Whatever lies beside a file or a part, and whatever is in the part, the right file comes of it.
#[test]
fn records_that_lie() {
    let bytes = noise(SPAN as usize + 100_000, 13);
    let remote = Setting::new(&bytes).remote;
    let mut chance =
        noise(8 * 400, 14).chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    let mut next = |below: usize| (chance.pop().unwrap() % below as u64) as usize;
    let whole = Setting::new(&bytes);
    whole.fetch(&bytes).unwrap();
    let record = fs::read_to_string(Record::path(&whole.target())).unwrap();
    let numbers = ["0", "1", "-1", "1e9", "18446744073709551615", "16777216", "\"x\"", "null", "[]", "99999999"];
    for round in 0..24 {
        let mut text = record.clone();
        for _ in 0..1 + next(3) {
            let places: Vec<usize> =
                text.match_indices(": ").chain(text.match_indices(':')).map(|(at, _)| at + 1).collect();
            let at = places[next(places.len())];
            let len = text[at..].find([',', '}', ']']).unwrap_or(0);
            match next(4) {
                0 => text.truncate(next(text.len()) + 1),
                1 => {
                    let at = next(text.len());
                    text.replace_range(at..at + 1, "7");
                }
                _ => text.replace_range(at..at + len, numbers[next(numbers.len())]),
            }
            if !text.contains(':') {
                break;
            }
        }
        let setting = Setting { remote: remote.clone(), ..Setting::new(&bytes) };
        if round % 2 == 0 {
            let there = next(bytes.len() * 2);
            let mut part = bytes.iter().copied().cycle().take(there).collect::<Vec<u8>>();
            if round % 4 == 0 && there > 0 {
                part[there / 2] ^= 1;
            }
            fs::write(store::part(&setting.target()), part).unwrap();
            fs::write(Record::path(&store::part(&setting.target())), &text).unwrap();
            setting.fetch(&bytes).unwrap_or_else(|error| panic!("{text}: {error}"));
        } else {
            fs::write(setting.target(), &bytes).unwrap();
            fs::write(Record::path(&setting.target()), &text).unwrap();
            fetch(&setting.network, &setting.remote, &setting.target(), &mut |_| ControlFlow::Continue(()))
                .unwrap_or_else(|error| panic!("{text}: {error}"));
            assert!(fs::read(setting.target()).unwrap() == bytes, "{text}");
        }
    }
}

#[test]
fn repairs_meet_faults_too() {
    let bytes = noise(SPAN as usize + 500_000, 12);
    let cases: [(Vec<Fault>, u64); 6] = [
        (vec![Fault::Cut(100_000), Fault::Status(503, None)], 500_000),
        (vec![Fault::Stall(0)], 500_000),
        // The server has the range no longer, sends another, or another's bytes: then the whole file, once.
        (vec![Fault::Whole], bytes.len() as u64),
        (vec![Fault::NoRange], bytes.len() as u64),
        (vec![Fault::OtherRange], bytes.len() as u64),
        (vec![Fault::WrongByte(77)], bytes.len() as u64),
    ];
    for (faults, least) in cases {
        let mut setting = Setting::new(&bytes);
        setting.fetch(&bytes).unwrap();
        flip(&setting.target(), SPAN + 3);
        setting.hub.sent();
        setting.meet(faults.clone());
        let outcome = fetch(&setting.network, &setting.remote, &setting.target(), &mut |_| ControlFlow::Continue(()));
        assert!(matches!(outcome, Ok(Outcome::Repaired(..))), "{faults:?}: {outcome:?}");
        assert!(fs::read(setting.target()).unwrap() == bytes && setting.hub.sent() >= least, "{faults:?}");
    }
    // Where it cannot be had, nothing has the name, and the sound part is kept.
    let setting = Setting::new(&bytes);
    setting.fetch(&bytes).unwrap();
    flip(&setting.target(), SPAN + 3);
    setting.hub.faults(vec![Fault::Hang; 9]);
    setting.fetch_again().unwrap_err();
    assert_eq!(names(setting.folder.path()), ["x.gguf.part", "x.gguf.part.json"]);
    setting.hub.faults([]);
    setting.hub.sent();
    setting.fetch(&bytes).unwrap();
    assert_eq!(setting.hub.sent(), 500_000);
}

impl Setting {
    fn fetch_again(&self) -> Result<Outcome, Error> {
        fetch(&self.network, &self.remote, &self.target(), &mut |_| ControlFlow::Continue(()))
    }

    /// Downloads over a file that is damaged: until it is right, nothing has its name.
    fn fetch_repair(&self) -> Outcome {
        let target = self.target();
        let gone = Mutex::new(false);
        let outcome = fetch(&self.network, &self.remote, &target, &mut |event| {
            if matches!(event, Event::Repairing(..)) {
                *gone.lock().unwrap() = true;
                assert!(!target.exists());
            }
            ControlFlow::Continue(())
        });
        assert!(*gone.lock().unwrap());
        outcome.unwrap()
    }
}
