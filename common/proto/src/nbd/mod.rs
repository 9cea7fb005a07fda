//! The NBD protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.
//!
//! ```text
//! greeting → options and their replies → export ┃ requests → replies
//! (greeting) (option, option_reply)    (export)   (request)  (reply, errno)
//! ```
//!
//! [`handshake`] is a client's side of what is left of ┃, as a state machine, and [`serve`] a server's. Fixed newstyle only, with structured replies and
//! meta contexts, without extended headers.
//!
//! Everything is encoded and decoded side by side, for clients and servers. A decoder takes exactly the bytes of one part,
//! whose length it named before and limited.

mod errno;
mod export;
mod fields;
mod greeting;
pub mod handshake;
mod option;
mod option_reply;
mod reply;
mod request;
pub mod serve;
mod violation;

pub use errno::Errno;
pub use export::{BlockSize, ExportFlags};
pub use greeting::{CLIENT_FLAGS_LENGTH, ClientFlags, GREETING_LENGTH, Greeting};
pub use option::{InfoRequest, MetaQuery, OPTION_HEADER_LENGTH, OptionHeader, OptionKind, OptionRequest, info};
pub use option_reply::{Info, OPTION_REPLY_HEADER_LENGTH, OptionError, OptionReply, OptionReplyHeader};
pub use reply::{
    BlockStatus, CHUNK_LENGTH, Chunk, ChunkKind, Descriptor, ErrorChunk, HOLE_LENGTH, Hole, OFFSET_LENGTH, REPLY_START,
    Reply, SIMPLE_LENGTH, decode_offset, state,
};
pub use request::{Command, CommandFlags, REQUEST_LENGTH, Request};
pub use violation::Violation;

/// The port that is NBD's own.
pub const DEFAULT_PORT: u16 = 10809;
/// Longest string of the protocol.
pub const MAX_STRING: usize = 4096;
/// Longest data of an option. The protocol sets no limit; a name, all information requests and a dozen queries fit.
pub const MAX_OPTION: usize = 64 << 10;
/// Longest data of a reply to an option: a number and two strings, rounded up.
pub const MAX_OPTION_REPLY: usize = 16 << 10;
/// Most replies to one option: far more exports, or contexts, than a server lists.
pub const MAX_OPTION_REPLIES: usize = 4096;
/// Most extents in one reply. QEMU sends at most 128 Ki, nbdkit 1 Mi.
pub const MAX_DESCRIPTORS: usize = 1 << 20;
/// The context that tells holes and zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// What the contexts of QEMU's dirty bitmaps begin with.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// What reseal's own context begins with, which tells what changed since a restore point and says which. Its flags are those
/// of QEMU's bitmaps. A query of just this asks for whichever there is.
pub const CHANGED_SINCE: &str = "reseal:changed-since:";
