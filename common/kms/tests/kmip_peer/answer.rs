//! Requests as a server sees them, and answers to them.

use reseal_proto::kmip::tags;
use reseal_proto::kmip::ttlv::{Items, Value, Writer};

pub(crate) const CREATE: u32 = 0x01;
pub(crate) const LOCATE: u32 = 0x08;
pub(crate) const GET: u32 = 0x0A;
pub(crate) const GET_ATTRIBUTES: u32 = 0x0B;
pub(crate) const ACTIVATE: u32 = 0x12;
pub(crate) const REVOKE: u32 = 0x13;
pub(crate) const DESTROY: u32 = 0x14;
pub(crate) const DISCOVER_VERSIONS: u32 = 0x1E;
pub(crate) const ENCRYPT: u32 = 0x1F;
pub(crate) const DECRYPT: u32 = 0x20;

/// A request.
pub(crate) struct Asked<'a> {
    pub(crate) operation: u32,
    pub(crate) version: (i32, i32),
    pub(crate) payload: Items<'a>,
}

impl<'a> Asked<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Self {
        let message = Items::check(bytes).unwrap().structure(tags::REQUEST_MESSAGE).unwrap();
        let header = message.structure(tags::REQUEST_HEADER).unwrap();
        let version = header.structure(tags::PROTOCOL_VERSION).unwrap();
        let number = |tag| version.integer(tag).unwrap();
        let item = message.structure(tags::BATCH_ITEM).unwrap();
        Self {
            operation: item.enumeration(tags::OPERATION).unwrap(),
            version: (number(tags::PROTOCOL_VERSION_MAJOR), number(tags::PROTOCOL_VERSION_MINOR)),
            payload: item.structure(tags::REQUEST_PAYLOAD).unwrap(),
        }
    }

    pub(crate) fn id(&self) -> &'a str {
        match self.payload.find(tags::UNIQUE_IDENTIFIER) {
            Some(Value::Text(id)) => id,
            _ => panic!("no identifier"),
        }
    }
}

fn version(w: &mut Writer, (major, minor): (i32, i32)) {
    w.structure(tags::PROTOCOL_VERSION, |w| {
        w.integer(tags::PROTOCOL_VERSION_MAJOR, major);
        w.integer(tags::PROTOCOL_VERSION_MINOR, minor);
    });
}

/// A message around what `item` writes.
pub(crate) fn message(of: (i32, i32), item: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut w = Writer::new();
    w.structure(tags::RESPONSE_MESSAGE, |w| {
        w.structure(tags::RESPONSE_HEADER, |w| {
            version(w, of);
            w.integer(tags::BATCH_COUNT, 1);
        });
        w.structure(tags::BATCH_ITEM, item);
    });
    w.finish().to_vec()
}

/// Done, with what `payload` writes.
pub(crate) fn done(asked: &Asked<'_>, payload: impl FnOnce(&mut Writer)) -> Vec<u8> {
    message(asked.version, |w| {
        w.enumeration(tags::OPERATION, asked.operation);
        w.enumeration(tags::RESULT_STATUS, tags::SUCCESS);
        w.structure(tags::RESPONSE_PAYLOAD, payload);
    })
}

/// Not done.
pub(crate) fn refused(asked: &Asked<'_>, reason: u32, words: &str) -> Vec<u8> {
    message(asked.version, |w| {
        w.enumeration(tags::OPERATION, asked.operation);
        w.enumeration(tags::RESULT_STATUS, 1);
        w.enumeration(tags::RESULT_REASON, reason);
        w.text(tags::RESULT_MESSAGE, words);
    })
}

pub(crate) fn versions(asked: &Asked<'_>, offered: &[(i32, i32)]) -> Vec<u8> {
    done(asked, |w| offered.iter().for_each(|&one| version(w, one)))
}

pub(crate) fn ids(asked: &Asked<'_>, ids: &[&str]) -> Vec<u8> {
    done(asked, |w| ids.iter().for_each(|id| w.text(tags::UNIQUE_IDENTIFIER, id)))
}

/// The attributes of a key, as KMIP 2.0 lays them out.
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) object_type: u32,
    pub(crate) algorithm: u32,
    pub(crate) length: i32,
    pub(crate) usage: i32,
    pub(crate) state: Option<u32>,
}

impl Key {
    /// One that fits.
    pub(crate) const FIT: Self =
        Self { name: "a", object_type: 2, algorithm: 3, length: 256, usage: 12, state: Some(2) };

    pub(crate) fn answer(&self, asked: &Asked<'_>) -> Vec<u8> {
        done(asked, |w| {
            w.text(tags::UNIQUE_IDENTIFIER, asked.id());
            w.structure(tags::ATTRIBUTES, |w| {
                w.structure(tags::NAME, |w| {
                    w.text(tags::NAME_VALUE, self.name);
                    w.enumeration(tags::NAME_TYPE, 1);
                });
                w.enumeration(tags::OBJECT_TYPE, self.object_type);
                w.enumeration(tags::CRYPTOGRAPHIC_ALGORITHM, self.algorithm);
                w.integer(tags::CRYPTOGRAPHIC_LENGTH, self.length);
                w.integer(tags::CRYPTOGRAPHIC_USAGE_MASK, self.usage);
                if let Some(state) = self.state {
                    w.enumeration(tags::STATE, state);
                }
            });
        })
    }
}
