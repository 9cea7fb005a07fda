//! Options: what a client asks for before it reads.

use super::fields::{Fields, length32, put_string};
use super::greeting::IHAVEOPT;
use super::{MAX_OPTION, MAX_STRING, Violation};

pub const OPTION_HEADER_LENGTH: usize = 16;

/// Kinds of information about an export that a client may ask for.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Which option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    ExportName,
    Abort,
    List,
    StartTls,
    Info,
    Go,
    StructuredReply,
    ListMetaContext,
    SetMetaContext,
    Other(u32),
}

impl OptionKind {
    pub fn number(self) -> u32 {
        match self {
            OptionKind::ExportName => 1,
            OptionKind::Abort => 2,
            OptionKind::List => 3,
            OptionKind::StartTls => 5,
            OptionKind::Info => 6,
            OptionKind::Go => 7,
            OptionKind::StructuredReply => 8,
            OptionKind::ListMetaContext => 9,
            OptionKind::SetMetaContext => 10,
            OptionKind::Other(number) => number,
        }
    }

    pub fn of(number: u32) -> OptionKind {
        match number {
            1 => OptionKind::ExportName,
            2 => OptionKind::Abort,
            3 => OptionKind::List,
            5 => OptionKind::StartTls,
            6 => OptionKind::Info,
            7 => OptionKind::Go,
            8 => OptionKind::StructuredReply,
            9 => OptionKind::ListMetaContext,
            10 => OptionKind::SetMetaContext,
            other => OptionKind::Other(other),
        }
    }
}

/// What stands before the data of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    pub kind: OptionKind,
    /// Bytes that follow, at most `MAX_OPTION`.
    pub length: usize,
}

impl OptionHeader {
    pub fn decode(bytes: &[u8]) -> Result<OptionHeader, Violation> {
        let mut fields = Fields::of("an option", bytes);
        let magic = fields.u64()?;
        if magic != IHAVEOPT {
            return Err(Violation::Magic { what: "an option", found: magic, expected: IHAVEOPT });
        }
        let kind = OptionKind::of(fields.u32()?);
        let length = u64::from(fields.u32()?);
        fields.end()?;
        let too_long = || Violation::TooLong { what: "an option", length, max: MAX_OPTION as u64 };
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_OPTION).ok_or_else(too_long)?;
        Ok(OptionHeader { kind, length })
    }
}

/// Which export, and what of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest {
    pub export: String,
    /// Kinds of [`info`].
    pub wanted: Vec<u16>,
}

/// Which meta contexts of which export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaQuery {
    pub export: String,
    pub queries: Vec<String>,
}

/// An option with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionRequest {
    ExportName(String),
    Abort,
    List,
    StartTls,
    Info(InfoRequest),
    Go(InfoRequest),
    StructuredReply,
    ListMetaContext(MetaQuery),
    SetMetaContext(MetaQuery),
    /// One that is not known here; a server answers that it is not.
    Other(u32),
}

impl OptionRequest {
    pub fn kind(&self) -> OptionKind {
        match self {
            OptionRequest::ExportName(_) => OptionKind::ExportName,
            OptionRequest::Abort => OptionKind::Abort,
            OptionRequest::List => OptionKind::List,
            OptionRequest::StartTls => OptionKind::StartTls,
            OptionRequest::Info(_) => OptionKind::Info,
            OptionRequest::Go(_) => OptionKind::Go,
            OptionRequest::StructuredReply => OptionKind::StructuredReply,
            OptionRequest::ListMetaContext(_) => OptionKind::ListMetaContext,
            OptionRequest::SetMetaContext(_) => OptionKind::SetMetaContext,
            OptionRequest::Other(number) => OptionKind::Other(*number),
        }
    }

    /// Header and data. Strings must have at most `MAX_STRING` bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            OptionRequest::ExportName(name) => data.extend(name.as_bytes()),
            OptionRequest::Info(request) | OptionRequest::Go(request) => {
                put_string(&mut data, &request.export);
                data.extend(u16::try_from(request.wanted.len()).unwrap_or(u16::MAX).to_be_bytes());
                data.extend(request.wanted.iter().flat_map(|kind| kind.to_be_bytes()));
            }
            OptionRequest::ListMetaContext(query) | OptionRequest::SetMetaContext(query) => {
                put_string(&mut data, &query.export);
                data.extend(length32(query.queries.len()).to_be_bytes());
                query.queries.iter().for_each(|query| put_string(&mut data, query));
            }
            _ => {}
        }
        let mut out = Vec::with_capacity(OPTION_HEADER_LENGTH + data.len());
        out.extend(IHAVEOPT.to_be_bytes());
        out.extend(self.kind().number().to_be_bytes());
        out.extend(length32(data.len()).to_be_bytes());
        out.extend(data);
        out
    }

    /// From the data that followed a header.
    pub fn decode(kind: OptionKind, data: &[u8]) -> Result<OptionRequest, Violation> {
        let mut fields = Fields::of("an option's data", data);
        let request = match kind {
            OptionKind::ExportName => OptionRequest::ExportName(fields.last_string()?),
            OptionKind::Abort => {
                // Clients may give a reason, which nobody reads.
                fields.rest();
                OptionRequest::Abort
            }
            OptionKind::List => OptionRequest::List,
            OptionKind::StartTls => OptionRequest::StartTls,
            OptionKind::StructuredReply => OptionRequest::StructuredReply,
            OptionKind::Info => OptionRequest::Info(info_request(&mut fields)?),
            OptionKind::Go => OptionRequest::Go(info_request(&mut fields)?),
            OptionKind::ListMetaContext => OptionRequest::ListMetaContext(meta_query(&mut fields)?),
            OptionKind::SetMetaContext => OptionRequest::SetMetaContext(meta_query(&mut fields)?),
            OptionKind::Other(number) => {
                fields.rest();
                OptionRequest::Other(number)
            }
        };
        fields.end()?;
        Ok(request)
    }
}

fn info_request(fields: &mut Fields<'_>) -> Result<InfoRequest, Violation> {
    let export = fields.string()?;
    let count = usize::from(fields.u16()?);
    let wanted = fields.bytes(count * 2)?;
    let wanted = wanted.chunks_exact(2).map(|kind| u16::from_be_bytes([kind[0], kind[1]])).collect();
    Ok(InfoRequest { export, wanted })
}

fn meta_query(fields: &mut Fields<'_>) -> Result<MetaQuery, Violation> {
    let export = fields.string()?;
    let count = u64::from(fields.u32()?);
    // A query takes four bytes at least, so the option's own limit limits their number.
    let max = (MAX_OPTION / 4) as u64;
    if count > max {
        return Err(Violation::TooLong { what: "the list of meta contexts", length: count, max });
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    Ok(MetaQuery { export, queries })
}

/// Whether a name may be sent at all.
pub(super) fn fits(name: &str) -> bool {
    name.len() <= MAX_STRING && !name.contains('\0')
}
