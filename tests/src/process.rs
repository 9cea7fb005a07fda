//! Running programs: with an end, whatever they do, and with the memory that they took.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest that one command may take: what takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// One of this workspace's programs, which lie in the folder above the test's own, and beside the bench.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is missing: run `cargo build --workspace` first"))
}

/// A program that has ended.
#[derive(Debug)]
pub struct Run {
    /// What was run, for messages.
    pub line: String,
    /// Exit status; `None` if a signal ended it.
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    /// Most memory that it had at once. Not less than this process had when it started it, for the kernel counts that.
    pub peak_kib: u64,
}

/// A program that is running.
pub struct Running {
    child: Child,
    line: String,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
}

fn drain(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// Starts a program without input. Should this process be killed, so is it.
pub fn start(command: &mut Command) -> Running {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("can't start {command:?}: {e}"));
    let stdout = drain(child.stdout.take().unwrap());
    let stderr = drain(child.stderr.take().unwrap());
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    Running { child, line: words.join(" "), stdout, stderr }
}

/// Runs a program to its end.
pub fn run(command: &mut Command) -> Run {
    start(command).wait()
}

impl Running {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended; that can still be waited for.
    pub fn has_ended(&self) -> bool {
        // SAFETY: all zeros are a valid `siginfo_t`.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: the pointer is to a variable of this function.
        let result = unsafe { libc::waitid(libc::P_PID, self.child.id(), &raw mut info, flags) };
        // SAFETY: the call has filled the structure as one of a child.
        result == 0 && unsafe { info.si_pid() } != 0
    }

    /// Kills it without a chance to clean up, and waits for it.
    pub fn kill(mut self) -> Run {
        let _ = self.child.kill();
        self.wait()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it takes too long.
    pub fn wait(mut self) -> Run {
        let began = Instant::now();
        let mut pause = Duration::from_micros(500);
        let pid = i32::try_from(self.child.id()).unwrap();
        let (status, usage) = loop {
            let mut status = 0;
            // SAFETY: all zeros are a valid `rusage`.
            let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
            // SAFETY: both pointers are to variables of this function; the child is ours and was not waited for yet.
            match unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, &raw mut usage) } {
                0 if began.elapsed() > LIMIT => {
                    let _ = self.child.kill();
                    panic!("`{}` hangs: it was ended after {} s", self.line, LIMIT.as_secs());
                }
                0 => thread::sleep(pause),
                _ => break (status, usage),
            }
            pause = (pause * 2).min(Duration::from_millis(5));
        };
        let text = |bytes: JoinHandle<Vec<u8>>| String::from_utf8_lossy(&bytes.join().unwrap()).into_owned();
        Run {
            line: self.line,
            status: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)),
            stdout: text(self.stdout),
            stderr: text(self.stderr),
            peak_kib: u64::try_from(usage.ru_maxrss).unwrap(),
        }
    }
}

impl Run {
    /// Checks the exit status; of several a command may have one.
    #[track_caller]
    pub fn expect(self, statuses: &[i32]) -> Run {
        let wanted = self.status.is_some_and(|status| statuses.contains(&status));
        assert!(wanted, "`{}` should end with one of {statuses:?}: {self:#?}", self.line);
        self
    }

    /// Checks that it succeeded.
    #[track_caller]
    pub fn ok(self) -> Run {
        self.expect(&[0])
    }

    /// Checks that it failed with that status, and said all of this.
    #[track_caller]
    pub fn fails(self, status: i32, said: &[&str]) -> Run {
        let run = self.expect(&[status]);
        for text in said {
            assert!(run.stderr.contains(text), "`{}` should say {text:?}: {run:#?}", run.line);
        }
        run
    }

    /// Its output as one JSON document.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("`{}` printed no JSON ({e}): {self:#?}", self.line))
    }

    /// Its output as JSON documents, one a line.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// All that it printed.
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// Runs a program of the system that must succeed; its output.
#[track_caller]
pub fn system(program: &str, arguments: &[&str]) -> String {
    run(Command::new(program).args(arguments)).ok().stdout
}

/// Sends a signal.
pub fn signal(process: u32, signal: i32) {
    // SAFETY: a call that takes two numbers.
    unsafe { libc::kill(i32::try_from(process).unwrap(), signal) };
}

/// Waits until something is there.
///
/// # Panics
/// If it is not in time.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut find: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(began.elapsed() < limit, "{what} did not come within {} s", limit.as_secs());
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until something holds.
///
/// # Panics
/// If it does not in time.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    wait_for(what, limit, || holds().then_some(()));
}

/// A server of a test. It ends with this, and with the process that started it: a shell waits beside it for the end of a pipe.
pub struct Server(Child);

impl Server {
    /// Starts a program with that environment; what it prints goes to the end of `log` in a folder of its own. That is removed where this
    /// process ends without having dropped the server, as it does with one that all tests share.
    pub fn start<A: AsRef<OsStr>>(
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        environment: &[(&str, String)],
        folder: &Path,
    ) -> Server {
        let script = r#"program=$0; folder=$1; shift; "$program" "$@" >>"$folder/log" 2>&1 & server=$!
            read -r word; kill -9 $server; wait; [ "$word" = dropped ] || rm -rf "$folder""#;
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).arg(program).arg(folder).args(arguments);
        shell.envs(environment.iter().map(|(name, value)| (name, value)));
        Server(shell.stdin(Stdio::piped()).spawn().unwrap())
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        let shell = self.0.id();
        let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
        children.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// How long processors were at work for it.
    pub fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        // Behind the name, which may have spaces: the 12th and 13th word are ticks of user and of system.
        let words: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let ticks: u64 = words[11..13].iter().map(|word| word.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }
}

impl Drop for Server {
    /// As a power cut would.
    fn drop(&mut self) {
        let _ = self.0.stdin.take().map(|mut shell| shell.write_all(b"dropped\n"));
        let _ = self.0.wait();
    }
}

/// What `tests/scripts/setup.sh` has put into its cache under that name.
pub fn installed(name: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let cache = std::env::var_os("RESEAL_CACHE").map_or_else(|| workspace.join(".cache"), PathBuf::from);
    let path = cache.join(name);
    assert!(path.exists(), "there is no {}: run tests/scripts/setup.sh", path.display());
    path
}

/// A command whose process dies with this one.
pub fn bound_to_us(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    }
}
