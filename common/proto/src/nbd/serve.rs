//! A server's side of everything before the first request.
//!
//! ```text
//! greeting → flags → options: header → data → replies, until one opens an export
//! ```
//!
//! Architecture invariant: where TLS is demanded, a client learns nothing before it: neither whether an export is there nor
//! what the server knows.
//!
//! The machine knows no exports: where an option names one, it asks whoever drives it. Like the client's, it says how many
//! bytes it needs and is given exactly those, so that nothing is read past a point where TLS, or the first request, begins.

use super::greeting::{CLIENT_FLAGS_LENGTH, ClientFlags, Greeting};
use super::option_reply::{Info, OptionError, OptionReply};
use super::{
    BASE_ALLOCATION, BlockSize, CHANGED_SINCE, ExportFlags, InfoRequest, MAX_OPTION_REPLIES, MAX_STRING, MetaQuery,
    OPTION_HEADER_LENGTH, OptionHeader, OptionKind, OptionRequest, Violation, info,
};

/// Options that one client may send: many times what any does that wants to read.
pub const MAX_OPTIONS: usize = 1024;
/// The number by which clients know `base:allocation`.
pub const ALLOCATION_ID: u32 = 1;
/// The number by which they know what changed since a restore point.
pub const CHANGES_ID: u32 = 2;
/// Exports that are listed; the end of the list is a reply too.
pub const MAX_LISTED: usize = MAX_OPTION_REPLIES - 1;
/// What `base:allocation` and its like begin with.
const BASE: &str = "base:";
/// The same of our own.
const OWN: &str = "reseal:";
/// What follows the answer to `EXPORT_NAME`, unless the client can do without.
const ZEROES: usize = 124;

/// What there is of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsTerms {
    /// There is none.
    Absent,
    /// A client may have it.
    Offered,
    /// A client must have it.
    Demanded,
    /// The stream is inside TLS already.
    Established,
}

/// An export, as its clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its own name, where a client may have used another one.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    pub size: u64,
    pub flags: ExportFlags,
    pub block_size: BlockSize,
    /// Since when its changes can be told: what follows [`CHANGED_SINCE`].
    pub changed_since: Option<String>,
}

impl Facts {
    /// The context that tells its changes.
    fn changes(&self) -> Option<String> {
        self.changed_since.as_ref().map(|since| cut(format!("{CHANGED_SINCE}{since}")))
    }
}

/// Why an export is not opened, in words that the client may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub error: OptionError,
    pub text: String,
}

/// An export of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub description: String,
}

/// What both sides agreed on. The export is the one that was asked for last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// Reads are answered in chunks.
    pub structured: bool,
    /// The client may ask for `base:allocation`.
    pub allocation: bool,
    /// It may ask what changed since a restore point.
    pub changes: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Read exactly that many bytes and pass them on.
    Read(usize),
    Send(Vec<u8>),
    /// From the next byte on, both sides speak TLS.
    StartTls,
    /// Say what the export of that name is: [`ServerHandshake::opened`].
    Open(String),
    /// Say which exports there are: [`ServerHandshake::listed`].
    List,
    /// Requests follow.
    Done(Agreed),
    /// The client leaves, or wants what only the end of the connection answers.
    End,
}

/// What an export is opened for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Purpose {
    ExportName,
    Info(InfoRequest),
    Go(InfoRequest),
    ListContexts(MetaQuery),
    SetContexts(MetaQuery),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Begin,
    Flags,
    /// Between two options.
    Idle,
    Header,
    Data(OptionHeader),
    Opening(Purpose),
    Listing,
    /// TLS was agreed to, which is still to be said.
    TlsAgreed,
    Opened,
    Ended,
}

/// The machine. After an error it is of no use.
#[derive(Debug)]
pub struct ServerHandshake {
    tls: TlsTerms,
    state: State,
    /// Bytes that the last step asked for.
    expected: usize,
    options: usize,
    flags: ClientFlags,
    structured: bool,
    /// The export for which `base:allocation` was selected.
    allocation: Option<String>,
    /// The same of what changed.
    changes: Option<String>,
    agreed: Agreed,
}

impl ServerHandshake {
    pub fn new(tls: TlsTerms) -> ServerHandshake {
        ServerHandshake {
            tls,
            state: State::Begin,
            expected: 0,
            options: 0,
            flags: ClientFlags { fixed_newstyle: false, no_zeroes: false },
            structured: false,
            allocation: None,
            changes: None,
            agreed: Agreed { structured: false, allocation: false, changes: false },
        }
    }

    /// Goes on. `input` is what the last step asked to read; empty at the beginning and after any other step.
    pub fn advance(&mut self, input: &[u8]) -> Result<Step, Violation> {
        if input.len() != self.expected {
            return Err(Violation::Length { what: "what the handshake was given", length: input.len() as u64 });
        }
        let step = if self.expected == 0 { self.without_input()? } else { self.with_input(input)? };
        self.expected = if let Step::Read(length) = step { length } else { 0 };
        Ok(step)
    }

    /// Answers [`Step::Open`].
    pub fn opened(&mut self, found: Result<Facts, Refused>) -> Result<Step, Violation> {
        let State::Opening(purpose) = std::mem::replace(&mut self.state, State::Idle) else { return Err(misused()) };
        Ok(match (purpose, found) {
            (Purpose::ExportName, Ok(facts)) => self.by_export_name(&facts),
            (Purpose::ExportName, Err(_)) => self.end(),
            (Purpose::Info(request), Ok(facts)) => {
                let flags = self.flags_of(&facts);
                Step::Send(infos(OptionKind::Info, &request, Facts { flags, ..facts }))
            }
            (Purpose::Go(request), Ok(facts)) => self.go(&request, facts),
            (Purpose::ListContexts(query), Ok(facts)) => Step::Send(list_contexts(&query, &facts)),
            (Purpose::SetContexts(query), Ok(facts)) => Step::Send(self.set_contexts(query, &facts)),
            (Purpose::Info(_), Err(refused)) => Step::Send(refusal(OptionKind::Info, refused)),
            (Purpose::Go(_), Err(refused)) => Step::Send(refusal(OptionKind::Go, refused)),
            (Purpose::ListContexts(_), Err(refused)) => Step::Send(refusal(OptionKind::ListMetaContext, refused)),
            (Purpose::SetContexts(_), Err(refused)) => Step::Send(refusal(OptionKind::SetMetaContext, refused)),
        })
    }

    /// Answers [`Step::List`]. More than [`MAX_LISTED`] are cut off.
    pub fn listed(&mut self, found: Result<Vec<Listed>, Refused>) -> Result<Step, Violation> {
        let State::Listing = std::mem::replace(&mut self.state, State::Idle) else { return Err(misused()) };
        Ok(Step::Send(match found {
            Err(refused) => refusal(OptionKind::List, refused),
            Ok(exports) => {
                let mut out = Vec::new();
                for Listed { name, description } in exports.into_iter().take(MAX_LISTED) {
                    let (name, details) = (cut(name), cut(description));
                    out.extend(OptionReply::Server { name, details }.encode(OptionKind::List));
                }
                out.extend(OptionReply::Ack.encode(OptionKind::List));
                out
            }
        }))
    }

    fn without_input(&mut self) -> Result<Step, Violation> {
        Ok(match self.state {
            State::Begin => {
                self.state = State::Flags;
                Step::Send(Greeting { fixed_newstyle: true, no_zeroes: true }.encode().to_vec())
            }
            State::Flags => Step::Read(CLIENT_FLAGS_LENGTH),
            State::Idle => {
                self.state = State::Header;
                Step::Read(OPTION_HEADER_LENGTH)
            }
            State::TlsAgreed => {
                self.state = State::Idle;
                Step::StartTls
            }
            State::Opened => Step::Done(self.agreed),
            State::Ended => Step::End,
            State::Header | State::Data(_) | State::Opening(_) | State::Listing => return Err(misused()),
        })
    }

    fn with_input(&mut self, input: &[u8]) -> Result<Step, Violation> {
        match self.state {
            State::Flags => {
                self.flags = ClientFlags::decode(input)?;
                self.state = State::Header;
                Ok(Step::Read(OPTION_HEADER_LENGTH))
            }
            State::Header => {
                let header = OptionHeader::decode(input)?;
                self.options += 1;
                if self.options > MAX_OPTIONS {
                    return Err(Violation::TooManyOptions { max: MAX_OPTIONS });
                }
                self.state = State::Data(header);
                if header.length == 0 { Ok(self.option(header.kind, &[])) } else { Ok(Step::Read(header.length)) }
            }
            State::Data(header) => Ok(self.option(header.kind, input)),
            _ => Err(misused()),
        }
    }

    fn option(&mut self, kind: OptionKind, data: &[u8]) -> Step {
        self.state = State::Idle;
        // Whoever does not know fixed newstyle knows no replies to options either.
        if !self.flags.fixed_newstyle && kind != OptionKind::ExportName {
            return self.end();
        }
        let before_tls = self.tls == TlsTerms::Demanded;
        if before_tls && !matches!(kind, OptionKind::StartTls | OptionKind::Abort) {
            return match kind {
                OptionKind::ExportName => self.end(),
                _ => error(kind, OptionError::TlsRequired),
            };
        }
        match OptionRequest::decode(kind, data) {
            Err(_) if kind == OptionKind::ExportName => self.end(),
            Err(_) => error(kind, OptionError::Invalid),
            Ok(request) => self.request(request),
        }
    }

    fn request(&mut self, request: OptionRequest) -> Step {
        let kind = request.kind();
        match request {
            OptionRequest::Abort => {
                self.state = State::Ended;
                Step::Send(OptionReply::Ack.encode(kind))
            }
            OptionRequest::List => {
                self.state = State::Listing;
                Step::List
            }
            OptionRequest::StartTls => self.start_tls(),
            OptionRequest::StructuredReply => {
                self.structured = true;
                Step::Send(OptionReply::Ack.encode(kind))
            }
            OptionRequest::ExportName(name) => self.open(name, Purpose::ExportName),
            OptionRequest::Info(request) => self.open(request.export.clone(), Purpose::Info(request)),
            OptionRequest::Go(request) => self.open(request.export.clone(), Purpose::Go(request)),
            OptionRequest::ListMetaContext(_) | OptionRequest::SetMetaContext(_) if !self.structured => {
                error(kind, OptionError::Invalid)
            }
            OptionRequest::ListMetaContext(query) => self.open(query.export.clone(), Purpose::ListContexts(query)),
            OptionRequest::SetMetaContext(query) => {
                // Whatever comes of it, what was selected before is not any more.
                self.allocation = None;
                self.changes = None;
                self.open(query.export.clone(), Purpose::SetContexts(query))
            }
            OptionRequest::Other(_) => error(kind, OptionError::Unsupported),
        }
    }

    fn open(&mut self, name: String, purpose: Purpose) -> Step {
        self.state = State::Opening(purpose);
        Step::Open(name)
    }

    fn end(&mut self) -> Step {
        self.state = State::Ended;
        Step::End
    }

    fn start_tls(&mut self) -> Step {
        match self.tls {
            TlsTerms::Absent => error(OptionKind::StartTls, OptionError::Unsupported),
            TlsTerms::Established => error(OptionKind::StartTls, OptionError::Invalid),
            TlsTerms::Offered | TlsTerms::Demanded => {
                self.tls = TlsTerms::Established;
                // What was agreed to in the clear may have been somebody else's doing.
                self.structured = false;
                self.allocation = None;
                self.changes = None;
                self.state = State::TlsAgreed;
                Step::Send(OptionReply::Ack.encode(OptionKind::StartTls))
            }
        }
    }

    fn by_export_name(&mut self, facts: &Facts) -> Step {
        // Contexts are given up: they need a client that knows GO.
        self.agree(false, false);
        let mut out = Vec::with_capacity(10 + ZEROES);
        out.extend(facts.size.to_be_bytes());
        out.extend(self.flags_of(facts).0.to_be_bytes());
        if !self.flags.no_zeroes {
            out.extend([0; ZEROES]);
        }
        Step::Send(out)
    }

    fn go(&mut self, request: &InfoRequest, facts: Facts) -> Step {
        let selected = |context: &Option<String>| context.as_deref() == Some(request.export.as_str());
        self.agree(selected(&self.allocation), selected(&self.changes));
        let flags = self.flags_of(&facts);
        Step::Send(infos(OptionKind::Go, request, Facts { flags, ..facts }))
    }

    /// One chunk or several is a question only where there are chunks.
    fn flags_of(&self, facts: &Facts) -> ExportFlags {
        if self.structured { facts.flags } else { facts.flags.without(ExportFlags::SEND_DF) }
    }

    fn agree(&mut self, allocation: bool, changes: bool) {
        self.agreed = Agreed { structured: self.structured, allocation, changes };
        self.state = State::Opened;
    }

    fn set_contexts(&mut self, query: MetaQuery, facts: &Facts) -> Vec<u8> {
        let kind = OptionKind::SetMetaContext;
        let mut out = Vec::new();
        if query.queries.iter().any(|query| query == BASE_ALLOCATION) {
            out.extend(allocation(ALLOCATION_ID).encode(kind));
            self.allocation = Some(query.export.clone());
        }
        if let Some(name) = facts.changes()
            && query.queries.iter().any(|query| query == CHANGED_SINCE || *query == name)
        {
            out.extend(OptionReply::MetaContext { id: CHANGES_ID, name }.encode(kind));
            self.changes = Some(query.export);
        }
        out.extend(OptionReply::Ack.encode(kind));
        out
    }
}

/// A caller that does not follow the steps.
fn misused() -> Violation {
    Violation::Length { what: "what the handshake was given", length: 0 }
}

fn allocation(id: u32) -> OptionReply {
    OptionReply::MetaContext { id, name: BASE_ALLOCATION.to_owned() }
}

fn list_contexts(query: &MetaQuery, facts: &Facts) -> Vec<u8> {
    let kind = OptionKind::ListMetaContext;
    let wanted = |query: &String| query == BASE || query == BASE_ALLOCATION;
    let mut out = Vec::new();
    if query.queries.is_empty() || query.queries.iter().any(wanted) {
        // A list selects nothing, so there is no number yet.
        out.extend(allocation(0).encode(kind));
    }
    if let Some(name) = facts.changes() {
        let wanted = |query: &String| query == OWN || query == CHANGED_SINCE || *query == name;
        if query.queries.is_empty() || query.queries.iter().any(wanted) {
            out.extend(OptionReply::MetaContext { id: 0, name }.encode(kind));
        }
    }
    out.extend(OptionReply::Ack.encode(kind));
    out
}

/// The answer to INFO and GO. What a client asks for twice, it is told once.
fn infos(kind: OptionKind, request: &InfoRequest, facts: Facts) -> Vec<u8> {
    let wants = |info: u16| request.wanted.contains(&info);
    let mut out = OptionReply::Info(Info::Export { size: facts.size, flags: facts.flags }).encode(kind);
    if wants(info::NAME) {
        out.extend(OptionReply::Info(Info::Name(cut(facts.name))).encode(kind));
    }
    if let Some(description) = facts.description.filter(|_| wants(info::DESCRIPTION)) {
        out.extend(OptionReply::Info(Info::Description(cut(description))).encode(kind));
    }
    if wants(info::BLOCK_SIZE) {
        out.extend(OptionReply::Info(Info::BlockSize(facts.block_size)).encode(kind));
    }
    out.extend(OptionReply::Ack.encode(kind));
    out
}

fn error(kind: OptionKind, error: OptionError) -> Step {
    Step::Send(OptionReply::Error { error, text: String::new() }.encode(kind))
}

fn refusal(kind: OptionKind, Refused { error, text }: Refused) -> Vec<u8> {
    OptionReply::Error { error, text: cut(text) }.encode(kind)
}

/// A string of the protocol's own length.
fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_STRING));
    text
}
