//! Watches the scratch files while the snapshot is read. What QEMU can't copy there before the guest overwrites it
//! makes the guest's own write fail; so the snapshot is given up before that.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use reseal_qmp::Client;

use super::QemuError;
use super::leftovers::jobs;
use super::scratch::Scratch;

/// Between two looks. A guest writes tens of MiB meanwhile.
const INTERVAL: Duration = Duration::from_millis(25);

/// A thread that watches.
pub(super) struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    verdict: Arc<Mutex<Option<String>>>,
}

impl Watch {
    /// Begins to watch. The monitor is shared: while it is used, jobs can't be cancelled.
    pub(super) fn start(client: Arc<Mutex<Client>>, scratches: Arc<Vec<Scratch>>) -> Result<Watch, QemuError> {
        let (stop, stopped) = bounded::<()>(0);
        let verdict = Arc::new(Mutex::new(None));
        let given = verdict.clone();
        let watch = move || {
            while matches!(stopped.recv_timeout(INTERVAL), Err(RecvTimeoutError::Timeout)) {
                let Some(short) = scratches.iter().find_map(shortage) else { continue };
                *given.lock() = Some(short);
                // If the VM ended meanwhile, so did its jobs.
                let _ = jobs(&mut client.lock(), &mut Vec::new());
                return;
            }
        };
        let thread = std::thread::Builder::new().name("scratch".into()).spawn(watch);
        let thread = thread.map_err(|e| QemuError::host("start a thread", e))?;
        Ok(Watch { stop: Some(stop), thread: Some(thread), verdict })
    }

    /// Why the snapshot was given up, if it was.
    pub(super) fn verdict(&self) -> Option<String> {
        self.verdict.lock().clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn shortage(scratch: &Scratch) -> Option<String> {
    let folder = scratch.folder().display();
    match scratch.room() {
        Ok(room) if !room.is_short() => None,
        Ok(room) => Some(format!(
            "the guest overwrote so much while its disks were read that the scratch folder {folder} has only {} MiB left, \
             so the snapshot was given up before the guest could see an error; free space there, name a folder with \
             more room with --scratch, or back up when the guest writes less",
            room.left >> 20
        )),
        Err(e) => Some(format!("the scratch folder {folder} can't be watched: {e}")),
    }
}
