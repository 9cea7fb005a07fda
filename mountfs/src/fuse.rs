//! The FUSE layer: converts requests, calls, and replies. Whatever decides anything is below it.
//!
//! A FUSE thread answers what the caches know or the store can give at once; for anything else the request and its reply
//! go to the pool, under a deadline. So no FUSE thread ever waits for a store.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use crate::answer::{Noted, Shared, answer, answer_later, file_type};
use crate::disks::Disks;
use crate::errno::Fault;
use crate::files::OpenPoint;
use crate::handles::{Handle, OpenDisk};
use crate::inodes::Node;
use crate::pool::{Pool, Refuse};
use crate::transfer::Transfer;
use crate::view::{Attributes, Face, OpenContent, View};

/// Background requests in the kernel: enough that readahead of several readers keeps every thread busy.
const BACKGROUND: u16 = 64;
/// Attribute of the root by which `reseal umount` finds the process to wait for.
pub(crate) const PID_ATTRIBUTE: &str = "user.reseal.pid";
/// There is one generation of each inode, for numbers are never given again.
const GENERATION: Generation = Generation(0);

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE_KEPT: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// How a file is opened that this mount alone could change.
fn kept() -> FopenFlags {
    FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH
}

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

    /// The disk behind a handle that may write to it.
    fn writing<R: Refuse>(&self, inode: INodeNo, handle: FileHandle, reply: R) -> Option<(Node, Arc<Handle>, R)> {
        let (node, reply) = self.node(inode, reply)?;
        let (handle, reply) = self.handle(handle, reply)?;
        match &*handle {
            Handle::Disk(open) if open.is_for_writing => Some((node, handle, reply)),
            _ => {
                reply.refuse(&Fault::ReadOnly);
                None
            }
        }
    }

    fn transfer<'a>(&'a self, node: Node, handle: &'a Arc<Handle>) -> Option<Transfer<'a>> {
        let Handle::Disk(open) = &**handle else { return None };
        Some(Transfer { shared: &self.shared, pool: &self.pool, node, handle, open })
    }

    /// Makes durable what was written to a disk; of what can't be written all is.
    fn make_durable(&self, inode: INodeNo, handle: FileHandle, reply: ReplyEmpty) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let Some((handle, reply)) = self.handle(handle, reply) else { return };
        let flusher = match &*handle {
            Handle::Disk(open) if open.written.is_some() => self.shared.flushers.get(open.nth),
            Handle::Disk(_) | Handle::Text(..) | Handle::Folder(_) => None,
        };
        let Some(flusher) = flusher else { return reply.ok() };
        let noted = Noted { reply, node, shared: self.shared.clone() };
        flusher.flush(move |flushed| match flushed {
            Ok(()) => noted.reply.ok(),
            Err(fault) => noted.refuse(fault),
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
            // No file has a privilege that a write must take away. Without this the kernel asks for one before each write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
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

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let owns = uid.is_some() || gid.is_some() || mode.is_some() || flags.is_some();
        let work = move |view: &View, wait| check_new_attributes(view.attributes(node, wait)?, size, owns);
        answer(&self.shared, &self.pool, node, reply, work, move |shared, reply, attributes| {
            let (attr, lasting) = shared.attributes(node, &attributes);
            reply.attr(&lasting, &attr);
        });
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some((node, reply)) = self.node(inode, reply) else { return };
        let is_for_writing = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let work = move |view: &View, wait| {
            let content = view.open(node, wait)?;
            let can_be_written = match &content {
                OpenContent::Disk(_, nth, Face::Raw) => view.written(*nth).is_some(),
                OpenContent::Disk(_, _, Face::Vhd) | OpenContent::Text(..) => false,
            };
            if is_for_writing && !can_be_written { Err(Fault::ReadOnly) } else { Ok(content) }
        };
        answer(&self.shared, &self.pool, node, reply, work, move |shared, reply, content| {
            let (handle, flags) = match content {
                OpenContent::Text(point, content) => (Handle::Text(point, content), kept()),
                OpenContent::Disk(point, nth, face) => {
                    shared.disks.warm(point.manifest(), nth);
                    let written = shared.view.written(nth).cloned();
                    let flags = match (&written, face) {
                        // All that changes it comes through the kernel, by this very inode.
                        (Some(_), Face::Raw) if is_for_writing => FopenFlags::FOPEN_KEEP_CACHE,
                        (_, Face::Raw) | (None, Face::Vhd) => kept(),
                        // By another inode: what the kernel kept would be what it was.
                        (Some(_), Face::Vhd) => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
                    };
                    (Handle::Disk(OpenDisk::new(point, nth, face, written, is_for_writing)), flags)
                }
            };
            let number = shared.handles.insert(handle);
            reply.opened(FileHandle(number), flags);
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
            Handle::Disk(_) => {
                let Some(transfer) = self.transfer(node, &handle) else { return };
                transfer.read(offset, size, reply);
            }
            Handle::Folder(_) => reply.refuse(&Fault::IsAFolder),
        }
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        bytes: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some((node, handle, reply)) = self.writing(inode, handle, reply) else { return };
        let Some(transfer) = self.transfer(node, &handle) else { return };
        transfer.write(offset, bytes, reply);
    }

    fn fallocate(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some((node, handle, reply)) = self.writing(inode, handle, reply) else { return };
        let Some(transfer) = self.transfer(node, &handle) else { return };
        let end = offset.saturating_add(length);
        match mode {
            PUNCH_HOLE | ZERO_RANGE_KEPT => transfer.zero(offset, length, reply),
            libc::FALLOC_FL_ZERO_RANGE if end <= transfer.open.length() => transfer.zero(offset, length, reply),
            libc::FALLOC_FL_ZERO_RANGE => reply.refuse(&Fault::Fixed),
            _ => reply.refuse(&Fault::NoSuchAllocation),
        }
    }

    /// Who closes what was written to is told when that failed, and has it durable otherwise.
    fn flush(&self, _request: &Request, inode: INodeNo, handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.make_durable(inode, handle, reply);
    }

    fn fsync(&self, _request: &Request, inode: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.make_durable(inode, handle, reply);
    }

    fn fsyncdir(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
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

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.refuse(&Fault::ReadOnly);
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.refuse(&Fault::ReadOnly);
    }

    fn mkdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.refuse(&Fault::ReadOnly);
    }

    fn symlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.refuse(&Fault::ReadOnly);
    }

    fn link(&self, _request: &Request, _inode: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.refuse(&Fault::ReadOnly);
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.refuse(&Fault::ReadOnly);
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.refuse(&Fault::ReadOnly);
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.refuse(&Fault::ReadOnly);
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
        Handle::Disk(open) => open.length(),
        Handle::Text(point, content) => text(point, *content).len() as u64,
        Handle::Folder(_) => return Err(Fault::IsAFolder),
    };
    if from >= length {
        return Err(Fault::PastData);
    }
    let found = match (whence, handle) {
        (libc::SEEK_DATA, Handle::Disk(open)) => open.next_data(disks, from)?.ok_or(Fault::PastData)?,
        (libc::SEEK_HOLE, Handle::Disk(open)) => open.next_hole(disks, from)?,
        (libc::SEEK_DATA, Handle::Text(..) | Handle::Folder(_)) => from,
        (libc::SEEK_HOLE, Handle::Text(..) | Handle::Folder(_)) => length,
        _ => return Err(Fault::BadSeek),
    };
    i64::try_from(found).map_err(|_| Fault::PastData)
}

/// What a disk's attributes are after they were asked to be others: times are taken note of and not kept, for programs that
/// write to a file like to set them, and another length than it has, owner or mode is refused.
fn check_new_attributes(now: Attributes, size: Option<u64>, owns: bool) -> Result<Attributes, Fault> {
    match now.is_writable {
        false => Err(Fault::ReadOnly),
        true if owns || size.is_some_and(|size| size != now.size) => Err(Fault::Fixed),
        true => Ok(now),
    }
}
