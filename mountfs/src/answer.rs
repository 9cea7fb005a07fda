//! How a request is answered: at once from what is known, or later by the pool under a deadline.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    FileAttr, FileType, INodeNo, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, ReplyXattr,
};
use reseal_vault::Wait;

use crate::disks::Disks;
use crate::errno::{Fault, errno};
use crate::flusher::Flusher;
use crate::handles::Handles;
use crate::inodes::Node;
use crate::journal::Journal;
use crate::pool::{Pool, Refuse};
use crate::readahead::Readahead;
use crate::view::{Attributes, Lasting, NodeKind, View};

/// How long the kernel may believe what never changes.
const FIXED: Duration = Duration::from_secs(3600);
/// How long it may believe what does: so long may a new restore point take to appear.
const CHANGING: Duration = Duration::from_secs(1);

macro_rules! refuse {
    ($($reply:ty),*) => {$(
        impl Refuse for $reply {
            fn refuse(self, fault: &Fault) {
                self.error(errno(fault));
            }
        }
    )*};
}

refuse!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyLseek,
    ReplyOpen,
    ReplyWrite,
    ReplyXattr
);

/// What the FUSE threads and the workers share.
pub(crate) struct Shared {
    pub(crate) view: View,
    pub(crate) disks: Disks,
    pub(crate) readahead: Readahead,
    pub(crate) journal: Arc<Journal>,
    pub(crate) handles: Handles,
    /// Of the disks that are written to, by their places.
    pub(crate) flushers: Vec<Flusher>,
    /// Whether other users may read.
    pub(crate) is_for_others: bool,
    /// User and group that everything belongs to.
    pub(crate) owner: (u32, u32),
    /// When it was mounted.
    pub(crate) since: SystemTime,
}

/// A reply that says in the journal why it was refused.
pub(crate) struct Noted<R> {
    pub(crate) reply: R,
    pub(crate) node: Node,
    pub(crate) shared: Arc<Shared>,
}

impl<R: Refuse> Refuse for Noted<R> {
    fn refuse(self, fault: &Fault) {
        self.shared.note(self.node, fault);
        self.reply.refuse(fault);
    }
}

impl Shared {
    /// Says what went wrong with a node, if that is more than a wrong name.
    pub(crate) fn note(&self, node: Node, fault: &Fault) {
        if fault.is_worth_a_line() {
            self.journal.say(&format!("{}: {fault}", self.view.describe(node)));
        }
    }

    /// Attributes as the kernel wants them, and how long it may believe them.
    pub(crate) fn attributes(&self, node: Node, attributes: &Attributes) -> (FileAttr, Duration) {
        let time = attributes.time.and_then(|time| u64::try_from(time.0).ok());
        let time = time.map_or(self.since, |milliseconds| UNIX_EPOCH + Duration::from_millis(milliseconds));
        let (perm, nlink) = match attributes.kind {
            NodeKind::Folder => (0o555, 2),
            NodeKind::File if !attributes.is_writable => (0o444, 1),
            NodeKind::File if self.is_for_others => (0o644, 1),
            NodeKind::File => (0o600, 1),
            NodeKind::Link => (0o777, 1),
        };
        let attr = FileAttr {
            ino: INodeNo(node.inode()),
            size: attributes.size,
            blocks: attributes.used.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: file_type(attributes.kind),
            perm,
            nlink,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            // What programs that ask for it read at a time: a few clusters.
            blksize: 128 * 1024,
            flags: 0,
        };
        let lasting = match attributes.lasting {
            Lasting::Fixed => FIXED,
            Lasting::Changing => CHANGING,
        };
        (attr, lasting)
    }
}

/// The kind as the kernel wants it.
pub(crate) fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Folder => FileType::Directory,
        NodeKind::File => FileType::RegularFile,
        NodeKind::Link => FileType::Symlink,
    }
}

/// Answers from what is known; otherwise hands the request, with its reply, to the pool.
pub(crate) fn answer<R: Refuse, T>(
    shared: &Arc<Shared>,
    pool: &Pool,
    node: Node,
    reply: R,
    work: impl Fn(&View, Wait) -> Result<T, Fault> + Send + 'static,
    deliver: impl FnOnce(&Shared, R, T) + Send + 'static,
) {
    match work(&shared.view, Wait::MustNot) {
        Ok(value) => deliver(shared, reply, value),
        Err(fault) if fault.would_block() => {
            answer_later(shared, pool, node, reply, move |shared| work(&shared.view, Wait::May), deliver);
        }
        Err(fault) => Noted { reply, node, shared: shared.clone() }.refuse(&fault),
    }
}

/// Hands the request, with its reply, to the pool.
pub(crate) fn answer_later<R: Refuse, T>(
    shared: &Arc<Shared>,
    pool: &Pool,
    node: Node,
    reply: R,
    work: impl FnOnce(&Shared) -> Result<T, Fault> + Send + 'static,
    deliver: impl FnOnce(&Shared, R, T) + Send + 'static,
) {
    let shared = shared.clone();
    pool.submit(Noted { reply, node, shared: shared.clone() }, move |ticket| match work(&shared) {
        Ok(value) => ticket.answer(|noted| deliver(&shared, noted.reply, value)),
        Err(fault) => ticket.answer(|noted| noted.refuse(&fault)),
    });
}
