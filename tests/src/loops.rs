//! File systems and block devices of a test, gone when it ends, however it does.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{run, system};

/// A loop device over a file.
pub struct Loop(pub PathBuf);

impl Loop {
    /// Attaches one. Needs root.
    pub fn new(file: &Path) -> Loop {
        Loop(PathBuf::from(system("losetup", &["--find", "--show", text(file)]).trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

/// A mounted file system.
pub struct Mount(pub PathBuf);

impl Mount {
    /// A fresh ext4 of so many bytes in a file, mounted at a folder that is made. Needs root.
    pub fn ext4(file: &Path, at: &Path, length: u64) -> Mount {
        std::fs::File::create_new(file).unwrap().set_len(length).unwrap();
        // Without reserved blocks, so that root meets the end of the space as others do.
        system("mke2fs", &["-q", "-t", "ext4", "-m", "0", text(file)]);
        Mount::of(&["-o", "loop", text(file)], at)
    }

    /// A file system in memory, of at most so many bytes.
    pub fn tmpfs(at: &Path, length: u64) -> Mount {
        Mount::of(&["-t", "tmpfs", "-o", &format!("size={length}"), "tmpfs"], at)
    }

    fn of(arguments: &[&str], at: &Path) -> Mount {
        std::fs::create_dir_all(at).unwrap();
        system("mount", &[arguments, &[text(at)]].concat());
        Mount(at.to_owned())
    }

    /// Lets a tmpfs have more.
    pub fn resize_tmpfs(&self, length: u64) {
        system("mount", &["-o", &format!("remount,size={length}"), text(&self.0)]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily, should a process that is about to end still have a file open; a loop device goes with its mount.
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.0));
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
