//! The tree that a mount shows, without FUSE: names, attributes, links and contents of its nodes.
//!
//! ```text
//! /VM/TIME/NAME.raw, NAME.vmdk, NAME.vhd, vm.json, the captured definition
//!    /latest -> TIME
//! ```

use std::sync::Arc;

use reseal_format::time::Timestamp;
use reseal_vault::Wait;

use crate::catalog::{Age, Catalog};
use crate::errno::Fault;
use crate::files::{Content, OpenPoint};
use crate::inodes::{MAX_FILES, Node, VmIndex};
use crate::writable::WrittenDisk;

/// The link to a VM's newest point. No point has this name, for theirs are times.
const LATEST: &str = "latest";

/// What kind of node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    Folder,
    File,
    Link,
}

/// Whether what is known of a node can change while it is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasting {
    /// A restore point and all in it: never.
    Fixed,
    /// What is above it grows and shrinks.
    Changing,
}

/// Attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub kind: NodeKind,
    pub size: u64,
    /// Bytes that are not holes.
    pub used: u64,
    /// `None`: as long as the mount.
    pub time: Option<Timestamp>,
    pub lasting: Lasting,
    pub is_writable: bool,
}

impl Attributes {
    /// What `.` and `..` show: that they are folders.
    pub(crate) fn of_dots() -> Attributes {
        folder(None, Lasting::Changing)
    }
}

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    pub name: String,
    pub node: Node,
    pub attributes: Attributes,
}

/// A file that was opened.
#[derive(Clone)]
pub enum OpenContent {
    Text(Arc<OpenPoint>, Content),
    Disk(Arc<OpenPoint>, usize, Face),
}

/// How a disk is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Face {
    Raw,
    /// With a footer.
    Vhd,
}

/// The tree.
pub struct View {
    catalog: Catalog,
    /// Where the one restore point that is shown is written to: its disks, by their places in its manifest.
    written: Vec<Arc<WrittenDisk>>,
}

fn folder(time: Option<Timestamp>, lasting: Lasting) -> Attributes {
    Attributes { kind: NodeKind::Folder, size: 0, used: 0, time, lasting, is_writable: false }
}

fn link() -> Attributes {
    // As long as every time prints.
    let size = Timestamp(0).to_string().len() as u64;
    Attributes { kind: NodeKind::Link, size, used: 0, time: None, lasting: Lasting::Changing, is_writable: false }
}

impl View {
    /// The tree of a catalogue.
    pub fn new(catalog: Catalog) -> View {
        View { catalog, written: Vec::new() }
    }

    /// The same tree, where the only restore point that it shows is written to. The disks are by their places in its manifest.
    pub fn with_written(self, written: Vec<Arc<WrittenDisk>>) -> View {
        View { written, ..self }
    }

    /// What a disk is written to by.
    pub(crate) fn written(&self, nth: usize) -> Option<&Arc<WrittenDisk>> {
        self.written.get(nth)
    }

    fn file(&self, point: &OpenPoint, content: Content) -> Attributes {
        let (size, used) = point.size(content);
        let (written, is_writable) = match content {
            Content::Disk(nth) => (self.written(nth), true),
            Content::Vhd(nth) => (self.written(nth), false),
            Content::Vmdk(_) | Content::Facts | Content::Definition => (None, false),
        };
        let (kind, time) = (NodeKind::File, Some(point.manifest().created));
        match written {
            None => Attributes { kind, size, used, time, lasting: Lasting::Fixed, is_writable: false },
            Some(disk) => {
                let (used, time) = (disk.used(used).min(size), Some(disk.changed()));
                Attributes { kind, size, used, time, lasting: Lasting::Changing, is_writable }
            }
        }
    }

    /// A node in words, for the journal.
    pub fn describe(&self, node: Node) -> String {
        let vm = |vm: VmIndex| self.catalog.name(vm).map_or_else(|| "?".to_owned(), |name| name.to_string());
        match node {
            Node::Root => "the vault".to_owned(),
            Node::Vm(index) => vm(index),
            Node::Latest(index) => format!("{}@latest", vm(index)),
            Node::Point(index, number) => format!("{}@{number}", vm(index)),
            Node::File(index, number, file) => {
                let point = self.catalog.point(index, number, Wait::MustNot).ok();
                let name = point.as_ref().and_then(|point| point.file(file)).map_or("?", |(name, _)| name);
                format!("{}@{number} {name}", vm(index))
            }
        }
    }

    /// The child of that name.
    pub fn lookup(&self, parent: Node, name: &str, wait: Wait) -> Result<(Node, Attributes), Fault> {
        match parent {
            Node::Root => {
                let vm = self.catalog.find_vm(name, wait)?.ok_or(Fault::NoEntry)?;
                Ok((Node::Vm(vm), folder(None, Lasting::Changing)))
            }
            Node::Vm(vm) if name == LATEST && !self.catalog.is_one_point() => Ok((Node::Latest(vm), link())),
            Node::Vm(vm) => {
                // A time has one spelling here; others that parse are other names.
                let time = Timestamp::parse(name).filter(|time| time.to_string() == name).ok_or(Fault::NoEntry)?;
                let number = self.catalog.number_at(vm, time, wait)?.ok_or(Fault::NoEntry)?;
                // Opened now, so that a damaged one is an error here and not behind its name.
                self.catalog.point(vm, number, wait)?;
                Ok((Node::Point(vm, number), folder(Some(time), Lasting::Fixed)))
            }
            Node::Point(vm, number) => {
                let point = self.catalog.point(vm, number, wait)?;
                let index = point.find(name).ok_or(Fault::NoEntry)?;
                let (_, content) = point.file(index).ok_or(Fault::NoEntry)?;
                Ok((Node::File(vm, number, index), self.file(&point, content)))
            }
            Node::Latest(_) | Node::File(..) => Err(Fault::NotAFolder),
        }
    }

    /// A node's attributes.
    pub fn attributes(&self, node: Node, wait: Wait) -> Result<Attributes, Fault> {
        match node {
            Node::Root | Node::Vm(_) => Ok(folder(None, Lasting::Changing)),
            Node::Latest(_) => Ok(link()),
            Node::Point(vm, number) => Ok(folder(Some(self.catalog.time(vm, number, wait)?), Lasting::Fixed)),
            Node::File(vm, number, index) => {
                let point = self.catalog.point(vm, number, wait)?;
                let (_, content) = point.file(index).ok_or(Fault::NoEntry)?;
                Ok(self.file(&point, content))
            }
        }
    }

    /// What a folder holds.
    pub fn children(&self, node: Node) -> Result<Vec<Child>, Fault> {
        match node {
            Node::Root => {
                let child = |(vm, name): (VmIndex, reseal_format::names::VmName)| Child {
                    name: name.to_string(),
                    node: Node::Vm(vm),
                    attributes: folder(None, Lasting::Changing),
                };
                Ok(self.catalog.vms()?.into_iter().map(child).collect())
            }
            Node::Vm(vm) => {
                let point = |(number, time): (u32, Timestamp)| Child {
                    name: time.to_string(),
                    node: Node::Point(vm, number),
                    attributes: folder(Some(time), Lasting::Fixed),
                };
                let mut children: Vec<Child> = self.catalog.listing(vm)?.into_iter().map(point).collect();
                // It is there if there is a point to link to, damaged or not.
                if !self.catalog.is_one_point() && !self.catalog.live(vm, Age::Recent, Wait::May)?.is_empty() {
                    children.push(Child { name: LATEST.to_owned(), node: Node::Latest(vm), attributes: link() });
                }
                Ok(children)
            }
            Node::Point(vm, number) => {
                let point = self.catalog.point(vm, number, Wait::May)?;
                let child = |(index, name, content): (_, &str, _)| Child {
                    name: name.to_owned(),
                    node: Node::File(vm, number, index),
                    attributes: self.file(&point, content),
                };
                Ok(point.files().take(MAX_FILES).map(child).collect())
            }
            Node::Latest(_) | Node::File(..) => Err(Fault::NotAFolder),
        }
    }

    /// The folder above a folder.
    pub fn parent(node: Node) -> Node {
        match node {
            Node::Root | Node::Vm(_) => Node::Root,
            Node::Latest(vm) | Node::Point(vm, _) => Node::Vm(vm),
            Node::File(vm, number, _) => Node::Point(vm, number),
        }
    }

    /// Where a link leads.
    pub fn link(&self, node: Node) -> Result<String, Fault> {
        match node {
            Node::Latest(vm) => Ok(self.catalog.latest(vm)?.ok_or(Fault::NoEntry)?.to_string()),
            Node::Root | Node::Vm(_) | Node::Point(..) | Node::File(..) => Err(Fault::NotALink),
        }
    }

    /// Opens a file.
    pub fn open(&self, node: Node, wait: Wait) -> Result<OpenContent, Fault> {
        match node {
            Node::File(vm, number, index) => {
                let point = self.catalog.point(vm, number, wait)?;
                match point.file(index).ok_or(Fault::NoEntry)?.1 {
                    Content::Disk(nth) => Ok(OpenContent::Disk(point, nth, Face::Raw)),
                    Content::Vhd(nth) => Ok(OpenContent::Disk(point, nth, Face::Vhd)),
                    content @ (Content::Facts | Content::Definition | Content::Vmdk(_)) => {
                        Ok(OpenContent::Text(point, content))
                    }
                }
            }
            Node::Root | Node::Vm(_) | Node::Point(..) => Err(Fault::IsAFolder),
            Node::Latest(_) => Err(Fault::NotAFolder),
        }
    }
}
