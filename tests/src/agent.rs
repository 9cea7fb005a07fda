//! Running programs in a guest, through its agent.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// How long a sign of life may take before it is asked again: an agent that does not run yet never answers.
const SIGN: Duration = Duration::from_secs(5);
/// How long one that runs may take.
const ANSWER: Duration = Duration::from_secs(60);

fn ask(socket: &Path, command: &str, arguments: &Value, within: Duration) -> Option<Value> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(within)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    // What earlier clients did not wait for comes first.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let token = u64::from(now.subsec_nanos()) + 1;
    for (command, arguments) in [("guest-sync", json!({ "id": token })), (command, arguments.clone())] {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        stream.write_all(text.as_bytes()).ok()?;
        stream.write_all(b"\n").ok()?;
    }
    let mut is_in_step = false;
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let Ok(mut answer) = serde_json::from_str::<Value>(&line) else { continue };
        if is_in_step {
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            return Some(answer["return"].take());
        }
        is_in_step = answer["return"] == token;
    }
}

/// Starts a program in a guest, as soon as its agent runs.
///
/// # Panics
/// If that takes longer.
#[track_caller]
pub fn start_in_guest(socket: &Path, program: &str, arguments: &[&str], limit: Duration) -> u64 {
    let until = Instant::now() + limit;
    // Asking for the program itself until somebody answers could start it more than once.
    while ask(socket, "guest-ping", &json!({}), SIGN).is_none() {
        assert!(Instant::now() < until, "the guest's agent does not answer");
        sleep(Duration::from_millis(200));
    }
    let words = json!({ "path": program, "arg": arguments, "capture-output": true });
    ask(socket, "guest-exec", &words, ANSWER).expect("the agent answers")["pid"].as_u64().unwrap()
}

/// Runs one to its end, which must be a good one.
#[track_caller]
pub fn run_in_guest(socket: &Path, program: &str, arguments: &[&str], limit: Duration) {
    let until = Instant::now() + limit;
    let pid = start_in_guest(socket, program, arguments, limit);
    loop {
        let status = ask(socket, "guest-exec-status", &json!({ "pid": pid }), ANSWER).unwrap_or_default();
        if status["exited"] == true {
            assert_eq!(status["exitcode"], 0, "{program} {arguments:?}: {status}");
            return;
        }
        assert!(Instant::now() < until, "{program} {arguments:?} does not end");
        sleep(Duration::from_millis(100));
    }
}
