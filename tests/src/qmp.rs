//! A monitor of a running QEMU, to look at what backups do there.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A connection to a QMP socket, which serves one at a time.
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and leaves the negotiation behind.
    #[track_caller]
    pub fn connect(socket: &Path) -> Qmp {
        let stream = UnixStream::connect(socket).unwrap_or_else(|e| panic!("{}: {e}", socket.display()));
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Qmp { lines: BufReader::new(stream) };
        assert!(qmp.line().get("QMP").is_some(), "a greeting");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.lines.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }

    /// What a backup could leave behind.
    pub fn left_behind(&mut self) -> LeftBehind {
        LeftBehind::of(&mut |command, arguments| self.run(command, arguments))
    }

    /// Whether the guest runs.
    pub fn is_running(&mut self) -> bool {
        self.run("query-status", json!({}))["status"] == "running"
    }
}

/// Traces of a backup in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftBehind {
    pub jobs: usize,
    pub exports: usize,
    /// Objects such as secrets.
    pub objects: Vec<String>,
    pub nodes: Vec<String>,
    /// Node and name.
    pub bitmaps: Vec<(String, String)>,
}

impl LeftBehind {
    /// Asks whatever runs monitor commands.
    pub fn of(run: &mut dyn FnMut(&str, Value) -> Value) -> LeftBehind {
        let list = |value: Value| value.as_array().cloned().unwrap();
        let (mut nodes, mut bitmaps) = (Vec::new(), Vec::new());
        for node in list(run("query-named-block-nodes", json!({ "flat": true }))) {
            let name = node["node-name"].as_str().unwrap().to_owned();
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                bitmaps.push((name.clone(), bitmap["name"].as_str().unwrap_or_default().to_owned()));
            }
            nodes.push(name);
        }
        let objects = list(run("qom-list", json!({ "path": "/objects" })));
        LeftBehind {
            jobs: list(run("query-jobs", json!({}))).len(),
            exports: list(run("query-block-exports", json!({}))).len(),
            objects: objects.iter().map(|object| object["name"].as_str().unwrap().to_owned()).collect(),
            nodes,
            bitmaps,
        }
    }

    /// The same without bitmaps: what must be as it was before the first backup.
    pub fn but_bitmaps(mut self) -> LeftBehind {
        self.bitmaps.clear();
        self.objects.sort();
        self.nodes.sort();
        self
    }
}
