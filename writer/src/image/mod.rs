//! Disk images: the guest-visible disk inside a container (qcow2, VMDK, VHDX, VDI, VHD, LUKS), served by `qemu-nbd`.
//!
//! ```text
//! name and content → which container, if any         (format)
//! the chain of images, as qemu-img sees it → refusals (chain)
//! qemu-nbd on a socket that only we can reach         (server)
//! ```
//!
//! QEMU's own code reads the containers: it defines what a guest sees in them. It runs in a process of its own,
//! read-only, that dies with this one.
//!
//! Architecture invariant: no container is guessed from a disk's content alone, for the guest writes that content. A
//! header that names another file as its backing would make that file part of the backup.

mod chain;
mod error;
mod format;
mod server;

use std::path::Path;

pub use error::ImageError;
pub use format::{ImageFormat, decide};

use reseal_qemu::Secret;
use server::Server;

/// An image whose guest-visible disk is served over NBD, until this is dropped.
pub struct Image {
    server: Server,
}

impl Image {
    /// Serves an image read-only. `secret` is a file whose first line opens an encrypted one; an image that is not
    /// encrypted does not mind it.
    ///
    /// Call it from a thread that outlives the image: the server is bound to the life of the thread that starts it.
    pub fn serve(path: &Path, format: ImageFormat, secret: Option<&Path>) -> Result<Image, ImageError> {
        format::demand(path, format)?;
        let secret = secret.map(Secret::read).transpose()?;
        let chain = chain::inspect(path, format)?;
        let secret = chain.secret(path, secret.as_ref())?;
        let spec = chain::spec(path, format, secret.is_some())?;
        chain::check(path, format, &spec, secret)?;
        Ok(Image { server: Server::start(path, format, &spec, secret)? })
    }

    /// The socket that it is served on: a path that only this process can open, for the socket has no name.
    pub fn socket(&self) -> &Path {
        self.server.socket()
    }

    /// Name of the export.
    pub fn export(&self) -> &str {
        server::EXPORT
    }

    /// The process that serves it.
    pub fn process(&self) -> u32 {
        self.server.process()
    }
}
