//! File systems of one file each. One serves constant bytes: what remains is the cost of FUSE itself, the limit of
//! every mount. One passes an image through, to be read and perhaps written. One passes reads through and writes down where they were.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};

use crate::Result;

/// The one file's name.
pub(crate) const FILE: &str = "disk.raw";
/// As many as reseal's mount runs.
const THREADS: usize = 4;
const BACKGROUND: u16 = 64;
/// The largest request that the kernel makes.
const LARGEST_READ: usize = 1 << 20;
const FILE_INODE: INodeNo = INodeNo(2);
/// Nothing changes while it is mounted.
const VALID: Duration = Duration::from_secs(3600);

/// Where the bytes of the one file come from.
trait Content: Send + Sync + 'static {
    /// Whether the kernel may keep pages and read ahead; otherwise each request arrives as the reader made it.
    const CACHED: bool;
    fn read(&self, offset: u64, length: usize) -> std::io::Result<Vec<u8>>;
    fn is_writable(&self) -> bool {
        false
    }
    fn write(&self, _offset: u64, _bytes: &[u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn finish(&self) {}
}

struct OneFile<C> {
    content: C,
    length: u64,
}

impl<C: Content> OneFile<C> {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let folder = inode == INodeNo::ROOT;
        FileAttr {
            ino: inode,
            size: if folder { 0 } else { self.length },
            blocks: if folder { 0 } else { self.length / 512 },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if folder { FileType::Directory } else { FileType::RegularFile },
            perm: match (folder, self.content.is_writable()) {
                (true, _) => 0o555,
                (false, true) => 0o600,
                (false, false) => 0o444,
            },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl<C: Content> Filesystem for OneFile<C> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // What reseal's mount asks for. A kernel that grants less is right: it does so to both.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_READ | InitFlags::FUSE_PARALLEL_DIROPS);
        if let Err(most) = config.set_max_readahead(u32::MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == FILE {
            reply.entry(&VALID, &self.attributes(FILE_INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&VALID, &self.attributes(inode));
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), if C::CACHED { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::FOPEN_DIRECT_IO });
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let length = u64::from(size).min(self.length.saturating_sub(offset));
        match usize::try_from(length)
            .map_err(std::io::Error::other)
            .and_then(|length| self.content.read(offset, length))
        {
            Ok(bytes) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match (self.content.write(offset, data), u32::try_from(data.len())) {
            (Ok(()), Ok(written)) => reply.written(written),
            _ => reply.error(Errno::EIO),
        }
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.content.sync() {
            Ok(()) => reply.ok(),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if offset == 0 {
            // One entry always fits.
            let _ = reply.add(FILE_INODE, 1, FileType::RegularFile, FILE);
        }
        reply.ok();
    }

    fn destroy(&mut self) {
        self.content.finish();
    }
}

fn serve<C: Content>(content: C, length: u64, mountpoint: &str, threads: usize) -> Result<()> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("bench".to_owned()),
        if content.is_writable() { MountOption::RW } else { MountOption::RO },
        MountOption::NoAtime,
        MountOption::NoDev,
        MountOption::NoSuid,
    ];
    config.n_threads = Some(threads);
    config.clone_fd = threads > 1;
    Ok(fuser::mount(OneFile { content, length }, mountpoint, &config)?)
}

struct Constant(Vec<u8>);

impl Content for Constant {
    const CACHED: bool = true;

    fn read(&self, _offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
        self.0
            .get(..length)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| std::io::Error::other("a larger read than the kernel makes"))
    }
}

/// `null-fs MOUNTPOINT LENGTH`
pub(crate) fn serve_constant(arguments: &[String]) -> Result<()> {
    let [mountpoint, length] = arguments else { return Err("null-fs MOUNTPOINT LENGTH".into()) };
    serve(Constant(vec![0xa5; LARGEST_READ]), length.parse()?, mountpoint, THREADS)
}

struct Passed {
    image: File,
    is_writable: bool,
}

impl Content for Passed {
    const CACHED: bool = true;

    fn read(&self, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.image.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.image.write_all_at(bytes, offset)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.image.sync_data()
    }
}

/// `pass-fs MOUNTPOINT IMAGE ro|rw`
pub(crate) fn serve_passed(arguments: &[String]) -> Result<()> {
    let [mountpoint, image, mode] = arguments else { return Err("pass-fs MOUNTPOINT IMAGE ro|rw".into()) };
    let is_writable = mode == "rw";
    let image = File::options().read(true).write(is_writable).open(image)?;
    let length = image.metadata()?.len();
    serve(Passed { image, is_writable }, length, mountpoint, THREADS)
}

struct Logged {
    image: File,
    log: Mutex<BufWriter<File>>,
}

impl Content for Logged {
    const CACHED: bool = false;

    fn read(&self, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.image.read_exact_at(&mut bytes, offset)?;
        let mut log = self.log.lock().map_err(|_| std::io::Error::other("another reader failed"))?;
        writeln!(log, "{offset} {length}")?;
        Ok(bytes)
    }

    fn finish(&self) {
        if let Ok(mut log) = self.log.lock() {
            // What can't be written is missed when the trace is read: it has no last line.
            let _ = writeln!(log, "end").and_then(|()| log.flush());
        }
    }
}

/// `log-reads MOUNTPOINT IMAGE LOG`
pub(crate) fn serve_logged(arguments: &[String]) -> Result<()> {
    let [mountpoint, image, log] = arguments else { return Err("log-reads MOUNTPOINT IMAGE LOG".into()) };
    let image = File::open(image)?;
    let length = image.metadata()?.len();
    // One thread: the log's order is then that of the requests.
    serve(Logged { image, log: Mutex::new(BufWriter::new(File::create(log)?)) }, length, mountpoint, 1)
}
