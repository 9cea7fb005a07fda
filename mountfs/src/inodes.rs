//! Inode numbers. Each spells the node that it stands for, so none has to be remembered: they are stable as long as the
//! mount is, and a `forget` frees nothing because nothing was kept.
//!
//! ```text
//! VM + 1 (22 bits) ‖ number of the restore point (32 bits) ‖ slot (10 bits)
//! ```
//!
//! Number 0 is the VM itself (slot 0) or its `latest` (slot 1). Otherwise slot 0 is the point's folder, slot 1 + n its
//! file n. The root is 1, which no other node spells.

/// A VM, by the order in which this mount has met it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmIndex(pub u32);

/// One of a restore point's files, by its place in the point's folder, which never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileIndex(pub u16);

/// Something with an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    Root,
    Vm(VmIndex),
    Latest(VmIndex),
    Point(VmIndex, u32),
    File(VmIndex, u32, FileIndex),
}

const ROOT: u64 = 1;
/// Enough for three files a disk, of the 256 that a restore point may have.
const SLOT_BITS: u32 = 10;
const NUMBER_BITS: u32 = 32;
/// VMs that fit; one index less than the bits allow, for the root.
pub const MAX_VMS: u32 = (1 << (64 - SLOT_BITS - NUMBER_BITS)) - 1;
/// Files of a restore point that fit, beside its folder.
pub const MAX_FILES: usize = (1 << SLOT_BITS) - 1;

impl Node {
    /// Its inode number.
    pub fn inode(self) -> u64 {
        let spell = |vm: VmIndex, number: u32, slot: u16| {
            (u64::from(vm.0) + 1) << (NUMBER_BITS + SLOT_BITS) | u64::from(number) << SLOT_BITS | u64::from(slot)
        };
        match self {
            Node::Root => ROOT,
            Node::Vm(vm) => spell(vm, 0, 0),
            Node::Latest(vm) => spell(vm, 0, 1),
            Node::Point(vm, number) => spell(vm, number, 0),
            Node::File(vm, number, file) => spell(vm, number, file.0 + 1),
        }
    }

    /// The node of an inode number, if it spells one.
    pub fn of_inode(inode: u64) -> Option<Node> {
        if inode == ROOT {
            return Some(Node::Root);
        }
        let vm = VmIndex(u32::try_from(inode >> (NUMBER_BITS + SLOT_BITS)).ok()?.checked_sub(1)?);
        let number = u32::try_from(inode >> SLOT_BITS & u64::from(u32::MAX)).ok()?;
        let slot = u16::try_from(inode & MAX_FILES as u64).ok()?;
        match (number, slot) {
            (0, 0) => Some(Node::Vm(vm)),
            (0, 1) => Some(Node::Latest(vm)),
            (0, _) => None,
            (number, 0) => Some(Node::Point(vm, number)),
            (number, slot) => Some(Node::File(vm, number, FileIndex(slot - 1))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_spells_itself_and_no_other() {
        let mut nodes = vec![Node::Root];
        for vm in [0, 1, 77, MAX_VMS - 1].map(VmIndex) {
            nodes.extend([Node::Vm(vm), Node::Latest(vm)]);
            for number in [1, 2, u32::MAX] {
                nodes.push(Node::Point(vm, number));
                nodes.extend([0, 1, 255, 3 * 256 + 1].map(|file| Node::File(vm, number, FileIndex(file))));
            }
        }
        let mut inodes: Vec<u64> = nodes.iter().map(|node| node.inode()).collect();
        assert!(nodes.iter().all(|node| Node::of_inode(node.inode()) == Some(*node)));
        inodes.sort_unstable();
        inodes.dedup();
        assert_eq!(inodes.len(), nodes.len());
        assert_eq!(Node::of_inode(0), None);
        assert_eq!(Node::of_inode(2), None);
    }
}
