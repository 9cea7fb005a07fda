//! What the end-to-end tests are made of: a [`site`] with the real programs ([`process`]), disks as they should be
//! ([`model`], [`random`], with a [`marker`] to look for), the same work through the libraries ([`library`]) over stores that fail or count
//! ([`faults`]) and a KMS that does so too ([`moody`]), while the tenant's keys are replaced step by step ([`rekeying`]); and
//! what ends with a test: mounts of a vault ([`mounting`]), other file systems and devices ([`loops`]), a guest that runs ([`guest`], as a [`domain`] of libvirt too, watched by [`qmp`]); two
//! sites, of which one sends to the other ([`remote`]), and is enrolled there by command ([`enrolled`]); object stores ([`seaweed`], [`ceph`], [`azurite`]), and what comes between one and
//! who uses it ([`s3_proxy`]); who works on a vault beside others ([`beside`]). Servers listen at [`ports`] that nobody else is given.
#![allow(clippy::unwrap_used)] // all of it is test code: it ends where it meets what it did not expect

pub mod agent;
pub mod azurite;
pub mod beside;
pub mod booted;
pub mod ceph;
pub mod certificates;
pub mod domain;
pub mod enrolled;
pub mod far;
pub mod faults;
pub mod frozen;
pub mod guest;
pub mod library;
pub mod libvirtd;
pub mod loops;
pub mod marker;
pub mod model;
pub mod moody;
pub mod mounting;
pub mod owner;
#[path = "../../common/kms/tests/support/ports.rs"]
pub mod ports;
pub mod process;
pub mod qmp;
pub mod random;
pub mod rekeying;
pub mod remote;
pub mod s3_proxy;
pub mod seaweed;
pub mod site;
pub mod synthetic;
pub mod verifier;
