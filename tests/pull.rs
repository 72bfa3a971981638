//! The commands around the store, as people and scripts use them: killed, run twice, on a full disk, without a network.
//!
//! Every test runs the program against a hub in this process and a store of its own. `GEMRUN_KILLS=100` repeats the kills as often.

mod common;
mod terminal;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::bytes::{flip, noise, sha256};
use common::hub::{Fault, Hub};
use gemrun::registry::DEMO;
use gemrun::registry::store::SPAN;
use serde_json::Value;
use terminal::Terminal;

/// A hub, and a store whose table knows its file as `mine`.
struct Setting {
    hub: Hub,
    home: tempfile::TempDir,
    bytes: Vec<u8>,
}

impl Setting {
    fn new(bytes: Vec<u8>) -> Setting {
        let setting = Setting { hub: Hub::new(bytes.clone()), home: tempfile::tempdir().unwrap(), bytes };
        setting.empty_store();
        setting
    }

    /// Removes all that is in the store but the table.
    fn empty_store(&self) {
        let _ = fs::remove_dir_all(self.home.path());
        let (len, hash) = (self.bytes.len(), sha256(&self.bytes));
        let table = format!(
            "[model.mine]\ntitle = \"Mine\"\nrepo = \"me/mine\"\nfile = \"x.gguf\"\nbytes = {len}\nsha256 = \"{hash}\"\nlicense = \"MIT\"\n"
        );
        fs::create_dir_all(self.home.path()).unwrap();
        fs::write(self.home.path().join("models.toml"), table).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.home.path().join("models/me--mine/x.gguf")
    }

    fn part(&self) -> PathBuf {
        self.file().with_extension("gguf.part")
    }

    fn gemrun(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.environment(&mut command);
        command
    }

    fn environment(&self, command: &mut Command) {
        let proxies = ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy"];
        for variable in
            proxies.iter().chain(&["GEMRUN_THREADS", "GEMRUN_KERNEL", "NO_COLOR", "HF_TOKEN", "SSL_CERT_FILE"])
        {
            command.env_remove(variable);
        }
        command.env("GEMRUN_HOME", self.home.path()).env("HF_ENDPOINT", &self.hub.address);
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.gemrun(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        let (out, err) = text(&output);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {err}");
        (out, err)
    }

    /// The one line of a failure.
    fn error(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        let (out, err) = text(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {out}{err}");
        let errors: Vec<&str> = err.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
        assert_eq!(errors.len(), 1, "{err}");
        errors[0].to_string()
    }

    fn list(&self) -> Value {
        serde_json::from_str(&self.ok(&["list", "--json"]).0).unwrap()
    }
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

fn below(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        match entry.path().is_dir() {
            true => found.extend(below(&entry.path()).iter().map(|inner| format!("{name}/{inner}"))),
            false => drop(found.insert(name)),
        }
    }
    found
}

#[test]
fn the_life_of_a_model() {
    let setting = Setting::new(DEMO.to_vec());
    assert_eq!(setting.error(&["run", "mine", "hi"], 3), "mine: not downloaded: gemrun pull mine (0.00 GB)");
    assert_eq!(setting.error(&["path", "mine"], 3), "mine: not downloaded: gemrun pull mine (0.00 GB)");
    assert_eq!(setting.list(), serde_json::json!([]));

    let (out, err) = setting.ok(&["pull", "mine"]);
    assert_eq!(out, format!("{}\n", setting.file().display()));
    assert!(err.contains("sha256 as expected") && err.contains("mine: packed, for faster text"), "{err}");
    assert_eq!(fs::read(setting.file()).unwrap(), DEMO);
    assert_eq!(setting.ok(&["path", "mine"]).0, out);

    let list = setting.list();
    assert_eq!(list.as_array().unwrap().len(), 1);
    let model = &list[0];
    assert_eq!((&model["name"], &model["state"], &model["packed"]), (&"mine".into(), &"whole".into(), &true.into()));
    assert_eq!((&model["repo"], &model["sha256"]), (&"me/mine".into(), &sha256(DEMO).into()));
    assert!(setting.ok(&["list"]).0.starts_with("mine  0.00 GB  whole  packed\n"));
    let all = setting.ok(&["list", "--all"]).0;
    assert!(all.contains("e2b ") && all.contains("not here") && all.contains("built in"), "{all}");

    let once = ["-n", "4", "--temp", "0"];
    let (from_store, _) = setting.ok(&[&["run", "mine", "What is gemrun?"], &once[..]].concat());
    assert_eq!(from_store, setting.ok(&[&["run", "demo", "What is gemrun?"], &once[..]].concat()).0);

    assert_eq!(setting.ok(&["verify"]).0, "mine: whole\n");
    assert!(setting.ok(&["pull", "mine"]).1.contains("x.gguf: here already"));
    setting.ok(&["pull", "mine", "--offline"]);
    let seen = setting.hub.seen().len();
    assert_eq!(seen, 1, "one request for all that");

    // A byte goes wrong. Its neighbours in the middle of a file of one span do not matter here; another test has many.
    flip(&setting.file(), 1234);
    assert_eq!(setting.list()[0]["state"], "changed");
    let error = setting.error(&["verify", "mine"], 5);
    let last = DEMO.len() - 1;
    assert_eq!(error, format!("mine: damaged: bytes 0-{last}: gemrun pull mine fetches them again"));
    assert_eq!(setting.list()[0]["state"], "damaged");
    setting.ok(&["pull", "mine"]);
    assert_eq!(fs::read(setting.file()).unwrap(), DEMO);
    assert_eq!(setting.ok(&["verify", "mine"]).0, "mine: whole\n");

    let (_, removed) = setting.ok(&["rm", "mine"]);
    assert!(removed.contains("x.gguf\n") && removed.contains("packed/"), "{removed}");
    assert_eq!(below(setting.home.path()), ["models.toml", "packed/lock"].map(String::from).into());
    assert!(setting.error(&["rm", "mine"], 3).starts_with("mine: nothing of it is in"));
}

#[test]
fn files_of_a_repository() {
    let setting = Setting::new(DEMO.to_vec());
    let listed = |names: &[&str]| {
        let files = names.iter().map(|name| format!(r#"{{"type":"file","path":"{name}","size":1}}"#));
        format!("[{}]", files.collect::<Vec<_>>().join(","))
    };
    setting.hub.list(&listed(&[
        "README.md",
        "one.gguf",
        "mmproj-F16.gguf",
        "mtp-one.gguf",
        "../../up.gguf",
        "a/b.gguf",
    ]));
    let (out, _) = setting.ok(&["pull", "hf:you/yours", "--no-pack"]);
    let place = setting.home.path().join("models/you--yours/one.gguf");
    assert_eq!(out, format!("{}\n", place.display()));
    assert_eq!(setting.list()[0]["name"], "hf:you/yours:one.gguf");
    for model in ["hf:you/yours", "hf:you/yours:one.gguf"] {
        assert_eq!(setting.ok(&["path", model]).0, out);
        assert_eq!(
            setting.ok(&["tokenize", model, "hi", "--json"]).0,
            setting.ok(&["tokenize", "demo", "hi", "--json"]).0
        );
    }
    let paths: Vec<String> = setting.hub.seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths, ["/api/models/you/yours/tree/main", "/you/yours/resolve/main/one.gguf"]);

    setting.hub.list(&listed(&["one.gguf", "two.gguf"]));
    let error = setting.error(&["pull", "hf:you/yours"], 2);
    assert_eq!(error, "hf:you/yours: several models: name one, as in hf:you/yours:FILE: one.gguf, two.gguf");
    setting.ok(&["pull", "hf:you/yours:two.gguf@v2", "--no-pack"]);
    assert!(setting.home.path().join("models/you--yours@v2/two.gguf").is_file());
    assert_eq!(setting.hub.seen().last().unwrap().path, "/you/yours/resolve/v2/two.gguf");
    for (list, code) in [("[]", 3), ("{\"error\":1}", 5), ("not json", 5), ("[{\"type\":\"file\"}]", 5)] {
        setting.hub.list(list);
        setting.error(&["pull", "hf:none/none"], code);
    }
    for wrong in ["hf:you", "hf:../x/y", "hf:you/yours:../x.gguf", "hf:you/yours@a/b", "nonsense", "./x.gguf"] {
        let code = if wrong == "nonsense" { 3 } else { 2 };
        setting.error(&["pull", wrong], code);
    }
    assert!(setting.error(&["pull", "hf:you/yours:three.gguf", "--offline"], 3).contains("--offline"));
    setting.ok(&["rm", "hf:you/yours:one.gguf", "hf:you/yours:two.gguf@v2"]);
    assert_eq!(below(setting.home.path()), ["models.toml".to_string()].into());
    assert_eq!(
        setting.error(&["rm", "/etc/hostname"], 2).split(": ").nth(1).unwrap(),
        format!("not in the store {}", setting.home.path().join("models").display())
    );
}

#[test]
fn through_a_stick_to_a_computer_without_network() {
    let setting = Setting::new(DEMO.to_vec());
    let stick = tempfile::tempdir().unwrap();
    let folder = stick.path().to_str().unwrap();
    let (out, _) = setting.ok(&["pull", "mine", "--to", folder]);
    assert_eq!(out, format!("{folder}/x.gguf\n"));
    assert_eq!(below(stick.path()), ["x.gguf", "x.gguf.json"].map(String::from).into());
    assert!(!setting.file().exists());
    assert!(setting.error(&["pull", "mine", "--to", "/nonexistent"], 3).contains("not a folder"));

    // The other computer knows neither the model nor a network.
    let other = Setting::new(Vec::new());
    fs::remove_file(other.home.path().join("models.toml")).unwrap();
    let (out, err) = other.ok(&["import", folder]);
    assert_eq!(out, format!("{}\n", other.file().display()));
    assert!(err.contains("imported; sha256 as expected"), "{err}");
    assert_eq!(fs::read(other.file()).unwrap(), DEMO);
    let list = other.list();
    assert_eq!((&list[0]["name"], &list[0]["packed"]), (&"hf:me/mine:x.gguf".into(), &true.into()));
    assert!(other.ok(&["import", &format!("{folder}/x.gguf")]).1.contains("here already"));
    assert_eq!(other.hub.seen().len(), 0);

    // From the store to a stick, without a download.
    setting.ok(&["import", folder, "--no-pack"]);
    fs::remove_dir_all(stick.path()).unwrap();
    fs::create_dir(stick.path()).unwrap();
    setting.hub.sent();
    setting.ok(&["pull", "mine", "--to", folder, "--offline"]);
    assert_eq!((setting.hub.sent(), fs::read(stick.path().join("x.gguf")).unwrap() == DEMO), (0, true));

    // What was damaged on the way does not get in, and neither does a record that leads elsewhere.
    flip(&stick.path().join("x.gguf"), 99);
    other.ok(&["rm", "hf:me/mine:x.gguf"]);
    assert!(other.error(&["import", folder], 5).contains("sha256"));
    let record = stick.path().join("x.gguf.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("me/mine", "../../mine")).unwrap();
    assert!(other.error(&["import", folder], 5).contains("expected owner/name"));
    assert_eq!(below(&other.home.path().join("models")), BTreeSet::new());
    // A file that nobody knows keeps its name.
    fs::remove_file(&record).unwrap();
    fs::rename(stick.path().join("x.gguf"), stick.path().join("own.gguf")).unwrap();
    other.ok(&["import", folder, "--no-pack"]);
    assert!(other.home.path().join("models/own.gguf").is_file());
    assert_eq!(other.list()[0]["state"], "unchecked");
    assert!(other.error(&["import", "/nonexistent"], 3).contains("no such file or folder"));
}

#[test]
fn what_the_environment_says() {
    let setting = Setting::new(noise(1000, 1));
    let with = |variables: &[(&str, &str)]| {
        let mut command = setting.gemrun(&["pull", "mine", "--no-pack"]);
        command.envs(variables.iter().copied());
        let output = command.output().unwrap();
        (output.status.code(), text(&output).1)
    };
    for (name, value) in [("HF_ENDPOINT", "ftp://example.org"), ("HF_ENDPOINT", "nowhere"), ("HF_TOKEN", "a\nb")] {
        let (code, err) = with(&[(name, value)]);
        assert!(code == Some(2) && err.starts_with(&format!("error: {name}: ")), "{err}");
    }
    let table = setting.home.path().join("models.toml");
    for (path, code, what) in
        [("/nonexistent.pem", 3, "no such file"), (table.to_str().unwrap(), 5, "no certificate in it")]
    {
        let (status, err) = with(&[("SSL_CERT_FILE", path)]);
        assert!(status == Some(code) && err.contains("SSL_CERT_FILE: ") && err.contains(what), "{err}");
    }
    assert_eq!(with(&[("HF_TOKEN", " hf_x\n"), ("HF_ENDPOINT", &format!("{}/", setting.hub.address))]).0, Some(0));
    let seen = setting.hub.seen();
    assert_eq!((seen.len(), seen[0].token.as_deref()), (1, Some("Bearer hf_x")));
    // The hub of this name is only reached through a proxy, and the token is not sent to it unencrypted.
    setting.empty_store();
    let away = [("HF_ENDPOINT", "http://hub.invalid"), ("HTTP_PROXY", &setting.hub.address), ("HF_TOKEN", "hf_x")];
    assert_eq!(with(&away).0, Some(0));
    let seen = setting.hub.seen();
    assert!(seen[1].path.contains("hub.invalid") && seen.iter().skip(1).all(|seen| seen.token.is_none()), "{seen:?}");
    setting.empty_store();
    assert_eq!(with(&[away[0], away[1], ("NO_PROXY", "hub.invalid")]).0, Some(1));
    assert_eq!(setting.hub.seen().len(), seen.len());
}

#[test]
fn an_earlier_upload() {
    let mut setting = Setting::new(noise(200_000, 1));
    let old = std::mem::replace(&mut setting.bytes, noise(300_000, 1));
    let table = setting.home.path().join("models.toml");
    setting.ok(&["pull", "mine", "--no-pack"]);
    let text = fs::read_to_string(&table).unwrap().replace(&sha256(&old), &sha256(&setting.bytes));
    let text = text.replace("bytes = 200000", "bytes = 300000");
    fs::write(&table, format!("{text}supersedes = [\"{}\"]\n", sha256(&old))).unwrap();
    setting.hub.replace(setting.bytes.clone());

    assert_eq!(setting.list()[0]["state"], "older");
    assert_eq!(setting.ok(&["verify"]).0, "mine: whole, but gemrun pull mine gets a newer upload\n");
    flip(&setting.file(), 100_000);
    let error = setting.error(&["verify", "mine"], 5);
    assert!(error.starts_with("mine: damaged: bytes 0-199999: gemrun pull mine"), "{error}");
    setting.ok(&["pull", "mine", "--no-pack"]);
    assert_eq!(fs::read(setting.file()).unwrap(), setting.bytes);
    assert_eq!((&setting.list()[0]["state"], setting.ok(&["verify"]).0.as_str()), (&"whole".into(), "mine: whole\n"));
}

#[test]
fn parts_that_belong_to_a_model() {
    let setting = Setting::new(DEMO.to_vec());
    let table = setting.home.path().join("models.toml");
    let mut text = fs::read_to_string(&table).unwrap();
    text += &format!("[model.mine.projector]\nrepo = \"me/mine\"\nfile = \"mmproj.gguf\"\nbytes = {}\n", DEMO.len());
    fs::write(&table, &text).unwrap();
    let models = setting.home.path().join("models");
    setting.ok(&["pull", "mine", "--no-pack"]);
    assert_eq!(below(&models), ["me--mine/x.gguf", "me--mine/x.gguf.json"].map(String::from).into(), "text alone");
    assert_eq!(setting.ok(&["pull", "mine", "--projector", "--no-pack"]).0.lines().count(), 2);
    assert!(below(&models).contains("me--mine/mmproj.gguf"));
    assert_eq!(setting.error(&["pull", "mine", "--drafter"], 3), "mine: no drafter is known");
    assert_eq!(setting.ok(&["verify", "mine"]).0.lines().count(), 2);
    setting.ok(&["rm", "mine"]);
    assert!(!models.join("me--mine").exists());
}

#[test]
fn a_missing_model_is_offered_on_a_terminal() {
    let setting = Setting::new(DEMO.to_vec());
    let question = || {
        let mut terminal =
            Terminal::open_with(setting.home.path(), "run mine", &[("HF_ENDPOINT", &setting.hub.address)])?;
        terminal.wait_for("Mine is not on this computer. Download it, 0.00 GB? [Y/n] ");
        Some(terminal)
    };
    let Some(mut no) = question() else { return };
    no.press("n\r");
    no.wait_for("error: mine: not downloaded: gemrun pull mine");
    no.rest();
    assert_eq!(no.end(), 3);
    let mut stop = question().unwrap();
    stop.press("\x03");
    stop.rest();
    assert_eq!(stop.end(), 130);
    assert_eq!(setting.hub.seen().len(), 0);
    let mut yes = question().unwrap();
    yes.press("\r");
    yes.wait_for("sha256 as expected");
    yes.wait_for("mine> ");
    yes.press("/exit\r");
    yes.rest();
    assert_eq!(yes.end(), 0);
    assert_eq!(fs::read(setting.file()).unwrap(), DEMO);
}

/// Waits until the child has ended, while others may kill it.
fn ended(child: &Arc<Mutex<Child>>) -> std::process::ExitStatus {
    loop {
        if let Some(status) = child.lock().unwrap().try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A pull is killed when a random number of bytes has been sent, and run again. Bytes are counted where they go into the
/// hub's sockets, so those that a killed process never read count, too; the network is one of at most 130 MB/s.
#[test]
fn killed_at_random_points() {
    let kills: u64 = std::env::var("GEMRUN_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let setting = Setting::new(noise(40_000_000, 1));
    setting.hub.pace(500);
    let size = setting.bytes.len() as u64;
    let chance = noise(8 * kills as usize, 1);
    let (mut sent, mut worst, mut killed, mut resumed) = (0, 0, 0, 0);
    for i in 0..kills {
        setting.empty_store();
        setting.hub.sent();
        let word = chance[8 * i as usize..][..8].try_into().unwrap();
        let at = u64::from_le_bytes(word) % size;
        let child = Arc::new(Mutex::new(setting.gemrun(&["pull", "mine", "--no-pack"]).spawn().unwrap()));
        let victim = Arc::clone(&child);
        setting.hub.when_sent(at, move || drop(victim.lock().unwrap().kill()));
        killed += u64::from(!ended(&child).success());
        assert!(!setting.file().exists() || fs::read(setting.file()).unwrap() == setting.bytes);
        resumed += u64::from(setting.part().exists());

        setting.ok(&["pull", "mine", "--no-pack"]);
        assert_eq!(sha256(&fs::read(setting.file()).unwrap()), sha256(&setting.bytes), "killed after {at} bytes");
        let all = setting.hub.sent();
        (sent, worst) = (sent + all, worst.max(all));
    }
    let (mean, worst) = (sent as f64 / (kills * size) as f64, worst as f64 / size as f64);
    println!(
        "{killed} of {kills} killed, {resumed} resumed, all right; each byte sent {mean:.3} times, at worst {worst:.3}"
    );
    assert!(killed * 10 >= kills * 9, "{killed} of {kills} were killed");
    assert!(mean <= 1.1, "each byte was sent {mean} times");
}

#[test]
fn one_of_two_pulls_waits() {
    let setting = Setting::new(noise(20_000_000, 1));
    // The first one gets no further until the second one waits for it.
    let (go, wait) = std::sync::mpsc::channel();
    setting.hub.when_sent(5_000_000, move || {
        let _ = wait.recv_timeout(Duration::from_secs(20));
    });
    let first = setting.gemrun(&["pull", "mine", "--no-pack"]).spawn().unwrap();
    let begun = Instant::now();
    while !setting.part().exists() && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut second = setting.gemrun(&["pull", "mine", "--no-pack"]).spawn().unwrap();
    let mut lines = BufReader::new(second.stderr.take().unwrap()).lines();
    let waiting = "another gemrun downloads this file: waiting until it is done";
    assert!(lines.any(|line| line.unwrap() == waiting), "the second one does not wait");
    go.send(()).unwrap();
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(rest, ["x.gguf: here already"]);
    assert!(second.wait().unwrap().success());
    let first = first.wait_with_output().unwrap();
    assert!(first.status.success() && text(&first).1.contains("fetched 0.02 GB"), "{}", text(&first).1);
    assert_eq!(setting.hub.sent(), 20_000_000);
    assert_eq!(fs::read(setting.file()).unwrap(), setting.bytes);
}

#[test]
fn a_damaged_file_is_repaired_by_the_span() {
    let setting = Setting::new(noise(50_000_000, 1));
    setting.ok(&["pull", "mine", "--no-pack"]);
    setting.hub.sent();
    flip(&setting.file(), 20_000_000);
    let error = setting.error(&["verify"], 5);
    let (from, to) = (SPAN, 2 * SPAN - 1);
    assert_eq!(error, format!("mine: damaged: bytes {from}-{to}: gemrun pull mine fetches them again"));
    let (_, err) = setting.ok(&["pull", "mine", "--no-pack"]);
    assert!(err.contains("17 MB were damaged, fetched 17 MB; sha256 as expected"), "{err}");
    assert_eq!((setting.hub.sent(), setting.ok(&["verify"]).0.as_str()), (SPAN, "mine: whole\n"));
}

#[test]
fn ctrl_c_keeps_what_is_there() {
    let setting = Setting::new(noise(8_000_000, 1));
    setting.hub.faults([Fault::Stall(3_000_000)]);
    let child = setting.gemrun(&["pull", "mine"]).spawn().unwrap();
    let begun = Instant::now();
    while fs::metadata(setting.part()).map_or(0, |meta| meta.len()) < 3_000_000 {
        assert!(begun.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(!text(&output).1.contains("error"), "{}", text(&output).1);
    assert_eq!(
        below(&setting.home.path().join("models")),
        ["me--mine/x.gguf.part", "me--mine/x.gguf.part.json"].map(String::from).into()
    );
    assert_eq!(
        (&setting.list()[0]["state"], &setting.list()[0]["bytes_whole"]),
        (&"partial".into(), &8_000_000.into())
    );
    assert!(setting.ok(&["list"]).0.contains("partial, 37 %"));
    setting.hub.sent();
    setting.ok(&["pull", "mine", "--no-pack"]);
    assert_eq!(setting.hub.sent(), 5_000_000);
}

/// Runs a shell script where namespaces can be had; `None`, and a word about it, where not.
fn in_namespace(setting: &Setting, flags: &str, script: &str) -> Option<Output> {
    let mut command = Command::new("unshare");
    if !command.args([flags, "true"]).output().is_ok_and(|output| output.status.success()) {
        eprintln!("not checked: unshare {flags} is not allowed here");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args([flags, "sh", "-c", script]).env("GEMRUN", env!("CARGO_BIN_EXE_gemrun"));
    setting.environment(&mut command);
    Some(command.output().unwrap())
}

/// A disk of a few megabytes that exists for the test alone.
#[test]
fn on_a_full_disk() {
    let setting = Setting::new(noise(8_000_000, 1));
    let mark = setting.home.path().with_extension("filled");
    let told = mark.clone();
    let wait = move || {
        let begun = Instant::now();
        while !told.exists() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    setting.hub.when_sent(2_000_000, wait);
    let script = format!(
        r#"set -u
        cp "$GEMRUN_HOME/models.toml" /tmp/table.$$
        mount -t tmpfs -o size=4m none "$GEMRUN_HOME" && cp /tmp/table.$$ "$GEMRUN_HOME/models.toml"
        "$GEMRUN" pull mine; echo "small: $?"
        mount -o remount,size=10m "$GEMRUN_HOME"
        folder=$GEMRUN_HOME/models/me--mine
        (until [ -s $folder/x.gguf.part ]; do sleep 0.01; done; dd if=/dev/zero of=$GEMRUN_HOME/fill bs=1M count=5 2>/dev/null; touch {mark}) &
        "$GEMRUN" pull mine; echo "filled: $?"
        wait; rm {mark} /tmp/table.$$
        ls $folder
        rm "$GEMRUN_HOME/fill"
        "$GEMRUN" pull mine --no-pack; echo "room again: $?"
        sha256sum $folder/x.gguf"#,
        mark = mark.display()
    );
    let Some(output) = in_namespace(&setting, "-rm", &script) else { return };
    let (out, err) = text(&output);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "small: 1", "{out}{err}");
    assert_eq!(lines[1..4], ["filled: 1", "x.gguf.part", "x.gguf.part.json"], "{out}{err}");
    assert!(lines.contains(&"room again: 0"), "{out}{err}");
    assert!(lines.last().unwrap().starts_with(&sha256(&setting.bytes)), "{out}{err}");
    let errors: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 2, "{err}");
    assert!(errors[0].contains("0.00 GB are free: expected 0.01 GB for x.gguf"), "{err}");
    assert!(errors[1].contains("the disk is full at") && errors[1].ends_with("it goes on"), "{err}");
    let ranges: Vec<Option<String>> = setting.hub.seen().into_iter().map(|seen| seen.range).collect();
    let from =
        ranges.last().unwrap().as_deref().unwrap().strip_prefix("bytes=").unwrap().trim_end_matches('-').to_string();
    assert!(from.parse::<u64>().unwrap() > 1_000_000, "continued at {from}");
}

/// Commands that must not need a network.
const LOCAL: [&str; 12] = [
    "",
    "--version",
    "run mine hi -n 2",
    "run demo hi -n 2",
    "show mine",
    "tokenize mine hi",
    "pack mine",
    "list",
    "path mine",
    "verify",
    "pull mine --offline",
    "eval logits demo --tokens 2,3 -o /dev/null",
];

/// Such that take longer.
const SLOW: [&str; 3] = ["bench demo -p 4 -n 2 -r 1 --no-warmup", "selftest", "doctor"];

#[test]
fn nothing_but_pull_needs_a_network() {
    let setting = Setting::new(DEMO.to_vec());
    setting.ok(&["pull", "mine", "--no-pack"]);
    let seen = setting.hub.seen().len();
    // Nothing is asked of the hub although it could be.
    for command in LOCAL {
        setting.ok(&command.split_whitespace().collect::<Vec<_>>());
    }
    assert_eq!(setting.hub.seen().len(), seen, "{:?}", setting.hub.seen());

    let each: String = LOCAL
        .iter()
        .chain(&SLOW)
        .map(|command| format!("\"$GEMRUN\" {command} >/dev/null || echo \"{command}: $?\"\n"))
        .collect();
    let pull = "\"$GEMRUN\" pull e2b; echo \"pull: $?\"\n\"$GEMRUN\" rm mine 2>/dev/null && echo removed";
    let Some(output) = in_namespace(&setting, "-rn", &(each + pull)) else { return };
    let (out, err) = text(&output);
    assert_eq!(out, "pull: 1\nremoved\n", "{err}");
    assert_eq!(err.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{err}");
}
