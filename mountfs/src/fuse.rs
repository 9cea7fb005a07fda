//! The FUSE layer: converts requests, calls, and replies. Whatever decides anything is below it.
//!
//! A FUSE thread answers what the caches know or the store can give at once; for anything else the request and its reply
//! go to the pool, under a deadline. So no FUSE thread ever waits for a store.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{
    FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyXattr, Request,
};
use reseal_vault::{VaultError, Wait};

use crate::answer::{Noted, Shared, answer, answer_later, file_type};
use crate::disks::Disks;
use crate::errno::Fault;
use crate::files::OpenPoint;
use crate::handles::{Handle, OpenDisk};
use crate::inodes::Node;
use crate::pool::{Pool, Refuse};
use crate::view::{OpenContent, View};
use reseal_vault::disk::with_scratch;
use reseal_vault::wipe::Secret;

/// Background requests in the kernel: enough that readahead of several readers keeps every thread busy.
const BACKGROUND: u16 = 64;
/// Attribute of the root by which `reseal umount` finds the process to wait for.
pub(crate) const PID_ATTRIBUTE: &str = "user.reseal.pid";
/// There is one generation of each inode, for numbers are never given again.
const GENERATION: Generation = Generation(0);

/// The file system.
pub(crate) struct ResealFs {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pool: Arc<Pool>,
}

impl ResealFs {
    /// The node of an inode number; one that was never given out is refused.
    fn node<R: Refuse>(&self, inode: INodeNo, reply: R) -> Option<(Node, R)> {
        match Node::of_inode(inode.0) {
            Some(node) => Some((node, reply)),
            None => {
                reply.refuse(&Fault::NoEntry);
                None
            }
        }
    }

    fn handle<R: Refuse>(&self, handle: FileHandle, reply: R) -> Option<(Arc<Handle>, R)> {
        match self.shared.handles.get(handle.0) {
            Some(handle) => Some((handle, reply)),
            None => {
                reply.refuse(&Fault::BadHandle);
                None
            }
        }
    }

    /// Reads what can be read at once, and hands on what can't.
    fn read_disk(&self, node: Node, handle: &Arc<Handle>, open: &OpenDisk, offset: u64, size: u32, reply: ReplyData) {
        let Some(disk) = open.disk() else { return reply.refuse(&Fault::NoEntry) };
        let length = disk.clip(offset, size as usize);
        let ahead = open.stream.advance(offset, length as u64, disk.disk().length, self.shared.disks.reach());
        self.shared.readahead.order(&open.point, open.nth, ahead);
        with_scratch(length, |tools, out| {
            let mut done = 0;
            match self.shared.disks.read_on(disk, offset, out, &mut done, Wait::MustNot, tools) {
                Ok(()) => reply.data(out),
                Err(VaultError::WouldBlock) => {
                    open.stream.waited();
                    self.read_later(node, handle.clone(), offset, length, Secret(out[..done].to_vec()), reply);
                }
                Err(error) => Noted { reply, node, shared: self.shared.clone() }.refuse(&error.into()),
            }
        });
    }

    /// Reads on from the bytes that are there already, with leave to wait.
    fn read_later(&self, node: Node, handle: Arc<Handle>, offset: u64, length: usize, begun: Secret, reply: ReplyData) {
        let shared = self.shared.clone();
        self.pool.submit(Noted { reply, node, shared: shared.clone() }, move |ticket| {
            let Handle::Disk(open) = &*handle else { return };
            let Some(disk) = open.disk() else { return };
            let mut done = begun.0.len();
            // The answer is given while the buffer is borrowed: it is not copied.
            with_scratch(length, |tools, out| {
                out[..done].copy_from_slice(&begun.0);
                match shared.disks.read_waiting(disk, offset, out, &mut done, tools) {
                    Ok(()) => ticket.answer(|noted| noted.reply.data(out)),
                    Err(error) => ticket.answer(|noted| noted.refuse(&error.into())),
                }
            });
        });
    }
}

fn part(bytes: &[u8], offset: u64, size: u32) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    &bytes[start..bytes.len().min(start.saturating_add(size as usize))]
}

fn text(point: &OpenPoint, content: crate::files::Content) -> &[u8] {
    point.text(content).as_bytes()
}

impl Filesystem for ResealFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // A kernel that lacks one of them works without it.
        for capability in [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ASYNC_DIO,
        ] {
            let _ = config.add_capabilities(capability);
        }
        if let Err(most) = config.set_max_readahead(u32::MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some((parent, reply)) = self.node(parent, reply) else { return };
        // All names here are text.
        let Some(name) = name.to_str().map(str::to_owned) else { return reply.refuse(&Fault::NoEntry) };
        let work = move |view: &View, wait| view.lookup(parent, &name, wait);
        answer(&self.shared, &self.pool, parent, reply, work, |shared, reply, (node, attributes)| {
            let (attr, lasting) = shared.attributes(node, &attributes);
            reply.entry(&lasting, &attr, GENERATION);
        });
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let work = move |view: &View, wait| view.attributes(node, wait);
        answer(&self.shared, &self.pool, node, reply, work, move |shared, reply, attributes| {
            let (attr, lasting) = shared.attributes(node, &attributes);
            reply.attr(&lasting, &attr);
        });
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let work = move |shared: &Shared| shared.view.link(node);
        answer_later(&self.shared, &self.pool, node, reply, work, |_, reply, target: String| {
            reply.data(target.as_bytes());
        });
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let work = move |view: &View, wait| view.open(node, wait);
        answer(&self.shared, &self.pool, node, reply, work, |shared, reply, content| {
            let handle = match content {
                OpenContent::Text(point, content) => Handle::Text(point, content),
                OpenContent::Disk(point, nth) => Handle::Disk(OpenDisk::new(point, nth)),
            };
            let number = shared.handles.insert(handle);
            reply.opened(FileHandle(number), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
        });
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let Some((handle, reply)) = self.handle(handle, reply) else { return };
        match &*handle {
            Handle::Text(point, content) => reply.data(part(text(point, *content), offset, size)),
            Handle::Disk(open) => self.read_disk(node, &handle, open, offset, size, reply),
            Handle::Folder(_) => reply.refuse(&Fault::IsAFolder),
        }
    }

    fn lseek(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let Some((handle, reply)) = self.handle(handle, reply) else { return };
        let work = move |shared: &Shared| seek(&shared.disks, &handle, offset, whence);
        answer_later(&self.shared, &self.pool, node, reply, work, |_, reply, found: i64| reply.offset(found));
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.shared.handles.remove(handle.0);
        reply.ok();
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let work = move |shared: &Shared| shared.view.children(node);
        answer_later(&self.shared, &self.pool, node, reply, work, |shared, reply, children| {
            let number = shared.handles.insert(Handle::Folder(children));
            reply.opened(FileHandle(number), FopenFlags::empty());
        });
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let Some((handle, mut reply)) = self.handle(handle, reply) else { return };
        let Handle::Folder(children) = &*handle else { return reply.refuse(&Fault::NotAFolder) };
        let dots =
            [(node, "."), (View::parent(node), "..")].into_iter().map(|(n, name)| (n, FileType::Directory, name));
        let rest = children.iter().map(|child| (child.node, file_type(child.attributes.kind), child.name.as_str()));
        for (next, (node, kind, name)) in
            (1..).zip(dots.chain(rest)).skip(usize::try_from(offset).unwrap_or(usize::MAX))
        {
            if reply.add(INodeNo(node.inode()), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let Some((handle, mut reply)) = self.handle(handle, reply) else { return };
        let Handle::Folder(children) = &*handle else { return reply.refuse(&Fault::NotAFolder) };
        // Of the dots the kernel takes the number and the kind only.
        let dot = crate::view::Attributes::of_dots();
        let dots = [(node, &dot, "."), (View::parent(node), &dot, "..")];
        let rest = children.iter().map(|child| (child.node, &child.attributes, child.name.as_str()));
        let all = dots.into_iter().chain(rest);
        for (next, (node, attributes, name)) in (1..).zip(all).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            let (attr, lasting) = self.shared.attributes(node, attributes);
            if reply.add(INodeNo(node.inode()), next, name, &lasting, &attr, GENERATION) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.shared.handles.remove(handle.0);
        reply.ok();
    }

    fn getxattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if Node::of_inode(inode.0) != Some(Node::Root) || name != PID_ATTRIBUTE {
            return reply.refuse(&Fault::NoAttribute);
        }
        let pid = std::process::id().to_string();
        match (u32::try_from(pid.len()).unwrap_or(0), size) {
            (length, 0) => reply.size(length),
            (length, size) if length > size => reply.refuse(&Fault::TooSmall),
            _ => reply.data(pid.as_bytes()),
        }
    }
}

/// `lseek` for data and holes; the kernel does the other kinds itself.
fn seek(disks: &Disks, handle: &Handle, offset: i64, whence: i32) -> Result<i64, Fault> {
    let from = u64::try_from(offset).map_err(|_| Fault::PastData)?;
    let length = match handle {
        Handle::Disk(open) => open.disk().map_or(0, |disk| disk.disk().length),
        Handle::Text(point, content) => text(point, *content).len() as u64,
        Handle::Folder(_) => return Err(Fault::IsAFolder),
    };
    if from >= length {
        return Err(Fault::PastData);
    }
    let disk = match handle {
        Handle::Disk(open) => open.disk(),
        Handle::Text(..) | Handle::Folder(_) => None,
    };
    let found = match (whence, disk) {
        (libc::SEEK_DATA, Some(disk)) => disks.next_data(disk, from)?.ok_or(Fault::PastData)?,
        (libc::SEEK_HOLE, Some(disk)) => disks.next_hole(disk, from)?,
        (libc::SEEK_DATA, None) => from,
        (libc::SEEK_HOLE, None) => length,
        _ => return Err(Fault::BadSeek),
    };
    i64::try_from(found).map_err(|_| Fault::PastData)
}
