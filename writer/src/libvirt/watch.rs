//! Watching the room for scratch. When it runs out the guest's writes would fail, so the backup is ended before.

use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::LibvirtError;
use super::command::Virsh;
use super::scratch::{MARGIN, ScratchFile, free};

/// How often the room is looked at: a guest that writes 2 GB/s fills the margin in 64 ms.
const POLL: Duration = Duration::from_millis(30);

/// A thread that watches.
pub(super) struct Watch {
    stop: Sender<()>,
    thread: Option<JoinHandle<Option<LibvirtError>>>,
}

impl Watch {
    /// Watches the files of a folder, and ends the domain's job when room for one of them is short.
    pub(super) fn start(folder: PathBuf, files: Vec<ScratchFile>, virsh: Virsh, domain: String) -> Watch {
        let (stop, stopped) = channel();
        let watch = move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(POLL) {
                let Some(room) = room(&free(&folder).ok()?, &files).filter(|room| *room < MARGIN) else { continue };
                // Where it can't be ended it has ended, or nothing more can be done.
                let _ = virsh.run(&["domjobabort", &domain]);
                return Some(LibvirtError::RanOut { folder, free: room });
            }
            None
        };
        Watch { stop, thread: Some(thread::spawn(watch)) }
    }

    /// Stops watching; what it found, once.
    pub(super) fn stop(&mut self) -> Option<LibvirtError> {
        let _ = self.stop.send(());
        self.thread.take()?.join().ok()?
    }

    /// What it found, once, if it has ended the job.
    pub(super) fn found(&mut self) -> Option<LibvirtError> {
        match self.thread.as_ref()?.is_finished() {
            true => self.stop(),
            false => None,
        }
    }
}

/// Bytes that the file with the least room can still get; `None` if all have what they can ever need.
fn room(free: &u64, files: &[ScratchFile]) -> Option<u64> {
    let open = files.iter().filter(|file| file.reserved < file.most);
    open.map(|file| {
        let used = std::fs::metadata(&file.path).map_or(0, |data| data.len());
        free.saturating_add(file.reserved.saturating_sub(used))
    })
    .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_is_reserved_and_what_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, used: u64, reserved, most| {
            let path = folder.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(used).unwrap();
            ScratchFile { path: path.to_str().unwrap().to_owned(), most, reserved }
        };
        let whole = file("a", 50, 100, 100);
        assert_eq!(room(&0, std::slice::from_ref(&whole)), None);
        assert_eq!(room(&5, &[whole, file("b", 60, 100, 200), file("c", 150, 100, 200)]), Some(5));
        assert_eq!(room(&5, &[file("d", 60, 100, 200)]), Some(45));
    }
}
