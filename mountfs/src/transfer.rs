//! Bytes of disks, to the kernel and from it.
//!
//! What needs no store is done by the FUSE thread itself, also where it is written: that goes to local files. What might have to wait is
//! handed on; of a write only the reading of what it does not cover, so that one which was refused for its deadline never happens later.

use std::sync::Arc;

use fuser::{ReplyData, ReplyEmpty, ReplyWrite};
use reseal_vault::Wait;
use reseal_vault::disk::with_scratch;
use reseal_vault::wipe::Secret;

use crate::answer::{Noted, Shared};
use crate::errno::Fault;
use crate::handles::{Handle, OpenDisk};
use crate::inodes::Node;
use crate::pool::{Pool, Refuse};
use crate::writable::{Edges, WrittenDisk};

/// A request about an open disk.
pub(crate) struct Transfer<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) pool: &'a Pool,
    pub(crate) node: Node,
    pub(crate) handle: &'a Arc<Handle>,
    pub(crate) open: &'a OpenDisk,
}

impl Transfer<'_> {
    fn noted<R>(&self, reply: R) -> Noted<R> {
        Noted { reply, node: self.node, shared: self.shared.clone() }
    }

    /// Reads what can be read at once, and hands on what can't.
    pub(crate) fn read(&self, offset: u64, size: u32, reply: ReplyData) {
        let Some(disk) = self.open.disk() else { return reply.refuse(&Fault::NoEntry) };
        let length = disk.clip(offset, size as usize);
        let ahead = self.open.stream.advance(offset, length as u64, disk.disk().length, self.shared.disks.reach());
        self.shared.readahead.order(&self.open.point, self.open.nth, ahead);
        let footer = self.open.footer(offset, size as usize);
        with_scratch(length + footer.len(), |tools, out| {
            let (bytes, behind) = out.split_at_mut(length);
            behind.copy_from_slice(footer);
            let mut done = 0;
            match self.open.read_on(&self.shared.disks, offset, bytes, &mut done, Wait::MustNot, tools) {
                Ok(()) => reply.data(out),
                Err(fault) if fault.would_block() => {
                    self.open.stream.waited();
                    self.read_later(offset, length, Secret(bytes[..done].to_vec()), footer, reply);
                }
                Err(fault) => self.noted(reply).refuse(&fault),
            }
        });
    }

    /// Reads on from the bytes that are there already, with leave to wait.
    fn read_later(&self, offset: u64, length: usize, begun: Secret, footer: &[u8], reply: ReplyData) {
        let (shared, handle, footer) = (self.shared.clone(), self.handle.clone(), footer.to_vec());
        self.pool.submit(self.noted(reply), move |ticket| {
            let Handle::Disk(open) = &*handle else { return };
            let mut done = begun.0.len();
            // The answer is given while the buffer is borrowed: it is not copied.
            with_scratch(length + footer.len(), |tools, out| {
                let (bytes, behind) = out.split_at_mut(length);
                behind.copy_from_slice(&footer);
                bytes[..done].copy_from_slice(&begun.0);
                match open.read_on(&shared.disks, offset, bytes, &mut done, Wait::May, tools) {
                    Ok(()) => ticket.answer(|noted| noted.reply.data(out)),
                    Err(fault) => ticket.answer(|noted| noted.refuse(&fault)),
                }
            });
        });
    }

    /// Writes; as much as is on the disk.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8], reply: ReplyWrite) {
        let (Some(disk), Some(_)) = (self.open.disk(), &self.open.written) else {
            return reply.refuse(&Fault::ReadOnly);
        };
        let bytes = &bytes[..disk.clip(offset, bytes.len())];
        if bytes.is_empty() {
            return reply.refuse(&Fault::PastEnd);
        }
        let deliver = |noted: Noted<ReplyWrite>, written: usize| {
            noted.reply.written(u32::try_from(written).unwrap_or(u32::MAX));
        };
        match self.edges(offset, bytes.len() as u64, Wait::MustNot) {
            Ok((written, edges)) => match written.write(offset, bytes, &edges) {
                Ok(()) => deliver(self.noted(reply), bytes.len()),
                Err(fault) => self.noted(reply).refuse(&fault),
            },
            Err(fault) if fault.would_block() => {
                let bytes = Secret(bytes.to_vec());
                let length = bytes.0.len() as u64;
                self.change_later(offset, length, reply, move |disk, edges, noted| {
                    match disk.write(offset, &bytes.0, edges) {
                        Ok(()) => deliver(noted, bytes.0.len()),
                        Err(fault) => noted.refuse(&fault),
                    }
                });
            }
            Err(fault) => self.noted(reply).refuse(&fault),
        }
    }

    /// Makes bytes zeros and gives back their room; what is behind the disk's end is left out.
    pub(crate) fn zero(&self, offset: u64, length: u64, reply: ReplyEmpty) {
        let (Some(disk), Some(_)) = (self.open.disk(), &self.open.written) else {
            return reply.refuse(&Fault::ReadOnly);
        };
        let length = length.min(disk.disk().length.saturating_sub(offset));
        if length == 0 {
            return reply.ok();
        }
        self.change_later(offset, length, reply, move |disk, edges, noted| match disk.zero(offset, length, edges) {
            Ok(()) => noted.reply.ok(),
            Err(fault) => noted.refuse(&fault),
        });
    }

    /// Hands on a change whose edges may have to be waited for. Once they are there its deadline can't end it any more.
    fn change_later<R: Refuse>(
        &self,
        offset: u64,
        length: u64,
        reply: R,
        change: impl FnOnce(&WrittenDisk, &Edges, Noted<R>) + Send + 'static,
    ) {
        let (shared, handle) = (self.shared.clone(), self.handle.clone());
        self.pool.submit(self.noted(reply), move |ticket| {
            let Handle::Disk(open) = &*handle else { return };
            match edges(&shared, open, offset, length, Wait::May) {
                Ok((disk, edges)) => ticket.answer(|noted| change(disk, &edges, noted)),
                Err(fault) => ticket.answer(|noted| noted.refuse(&fault)),
            }
        });
    }

    fn edges(&self, offset: u64, length: u64, wait: Wait) -> Result<(&WrittenDisk, Edges), Fault> {
        edges(self.shared, self.open, offset, length, wait)
    }
}

/// What of the restore point a change of that range needs, and what makes it.
fn edges<'a>(
    shared: &Shared,
    open: &'a OpenDisk,
    offset: u64,
    length: u64,
    wait: Wait,
) -> Result<(&'a WrittenDisk, Edges), Fault> {
    let (Some(under), Some(disk)) = (open.under(&shared.disks), open.written.as_deref()) else {
        return Err(Fault::ReadOnly);
    };
    let edges = with_scratch(0, |tools, _| disk.edges(under, offset, length, wait, tools))?;
    Ok((disk, edges))
}
