//! A vault that is mounted by the real program, until the guard goes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::model::DiskFile;
use crate::process::{Run, Running, bound_to_us, run, start};
use crate::site::Site;

/// How long a mount may take to be ready.
const READY: Duration = Duration::from_secs(45);

/// How long one may be in use by a program that is being loaded, or by what the kernel reads ahead from a store that is away.
const IN_USE: Duration = Duration::from_secs(120);

/// A mount in the foreground of a process of ours.
pub struct Mounted {
    pub path: PathBuf,
    process: Option<Running>,
}

/// Whether something is mounted at exactly that path, as this thread sees it: a test may have a namespace of its own.
pub fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

impl Mounted {
    /// Mounts a site's vault at that folder of the site; `arguments` are further ones of `reseal mount`.
    #[track_caller]
    pub fn new(site: &Site, folder: &str, arguments: &[&str]) -> Mounted {
        Mounted::try_new(site, folder, arguments).unwrap_or_else(|run| panic!("nothing was mounted: {run:#?}"))
    }

    /// The same; if the program ended before it was ready, how.
    pub fn try_new(site: &Site, folder: &str, arguments: &[&str]) -> Result<Mounted, Run> {
        let path = site.path(folder);
        std::fs::create_dir_all(&path).unwrap();
        let words = [&["mount", path.to_str().unwrap()], arguments].concat();
        let process = start(bound_to_us(&mut site.command("reseal", words)));
        let mut mounted = Mounted { path, process: Some(process) };
        let began = Instant::now();
        while !is_mounted(&mounted.path) {
            let process = mounted.process.as_ref().unwrap();
            if process.has_ended() || began.elapsed() > READY {
                return Err(mounted.process.take().unwrap().kill());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(mounted)
    }

    /// The folder of a point, by its number in `list`.
    pub fn point(&self, site: &Site, vm: &str, number: u32) -> PathBuf {
        let shown = site.reseal(["show", "--json", &format!("{vm}@{number}")]).ok().json();
        self.path.join(vm).join(shown["time"].as_str().unwrap())
    }

    /// A disk of a point.
    pub fn disk(&self, site: &Site, vm: &str, number: u32, disk: &str) -> DiskFile {
        DiskFile::open(&self.point(site, vm, number).join(format!("{disk}.raw")))
    }

    /// The process that serves it.
    pub fn process(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// Ends it as a user does; how its process ended. A program that another thread has just started has what this process has open until it
    /// is loaded, and the kernel waits for what it reads ahead, so the mount may be in use for a while after it was not.
    pub fn umount(mut self, site: &Site) -> Run {
        let began = Instant::now();
        loop {
            let run = site.reseal(["umount", self.path.to_str().unwrap()]);
            if run.status == Some(1) && run.stderr.contains("is in use") && began.elapsed() < IN_USE {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            run.ok();
            return self.process.take().unwrap().wait();
        }
    }

    /// Kills what serves it.
    pub fn kill(&mut self) {
        self.process.take().unwrap().kill();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            drop(process.kill());
        }
        if is_mounted(&self.path) {
            let _ = run(Command::new("umount").arg("--lazy").arg(&self.path));
        }
    }
}
