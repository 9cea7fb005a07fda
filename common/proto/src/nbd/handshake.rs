//! A client's side of everything before the first request.
//!
//! ```text
//! greeting → flags → [STARTTLS → TLS] → STRUCTURED_REPLY → SET_META_CONTEXT → GO
//! ```
//!
//! Architecture invariant: TLS comes first where it is wanted, and no name of an export is sent before it.
//!
//! The machine says how many bytes it needs and is given exactly those, so that nothing is read past a point where TLS, or
//! the first reply, begins.

use super::greeting::{ClientFlags, GREETING_LENGTH, Greeting};
use super::option::fits;
use super::{
    BlockSize, ExportFlags, Info, InfoRequest, MAX_OPTION_REPLIES, MetaQuery, OPTION_REPLY_HEADER_LENGTH, OptionError,
    OptionKind, OptionReply, OptionReplyHeader, OptionRequest, Violation, info,
};

/// Contexts that an error names: enough to find the one that was meant.
const MAX_OFFERED: usize = 32;

/// What a client wants.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub export: String,
    pub tls: bool,
    /// Meta contexts by their full names, and whether it must have them. A name that ends in a colon stands for any that begins
    /// so.
    pub contexts: Vec<(String, bool)>,
}

/// An open export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    pub size: u64,
    pub flags: ExportFlags,
    pub block_size: BlockSize,
    /// Reads are answered in chunks.
    pub structured: bool,
    /// Number and name of each context that was selected.
    pub contexts: Vec<(u32, String)>,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Read exactly that many bytes and pass them on.
    Read(usize),
    Send(Vec<u8>),
    /// From the next byte on, both sides speak TLS.
    StartTls,
    Done(Opened),
}

/// Why there is no open export.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A server that can't, or does not want to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the server does not speak fixed newstyle")]
    NotFixedNewstyle,
    #[error("the server does not offer TLS{}", why(.error, .text))]
    NoTls { error: OptionError, text: String },
    #[error("the server requires TLS{}", why(&OptionError::TlsRequired, .text))]
    TlsRequired { text: String },
    #[error("the server has no such export{}", why(&OptionError::Unknown, .text))]
    NoSuchExport { text: String },
    #[error("the name of the export is longer than NBD allows, or has a NUL")]
    BadName,
    #[error("the server does not offer {context} for this export{}", list(.offered))]
    NoContext { context: String, offered: Vec<String> },
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the server refuses {what}{}", why(.error, .text))]
    Other { what: &'static str, error: OptionError, text: String },
}

fn why(error: &OptionError, text: &str) -> String {
    match (error, text) {
        (OptionError::TlsRequired | OptionError::Unknown, "") => String::new(),
        (error, "") => format!(" ({error})"),
        (_, text) => format!(" (it says: {text})"),
    }
}

fn list(offered: &[String]) -> String {
    if offered.is_empty() { String::new() } else { format!("; it offers {}", offered.join(", ")) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    /// An option was sent.
    Header(OptionKind),
    Data(OptionReplyHeader),
    StartedTls,
    Done,
}

/// The machine. After an error it is of no use.
#[derive(Debug)]
pub struct ClientHandshake {
    wanted: Wanted,
    state: State,
    /// Bytes that the last step asked for.
    expected: usize,
    /// Replies to the option at hand.
    replies: usize,
    structured: bool,
    contexts: Vec<(u32, String)>,
    /// What a list of contexts has shown.
    offered: Vec<String>,
    export: Option<(u64, ExportFlags)>,
    block_size: BlockSize,
}

impl ClientHandshake {
    pub fn new(wanted: Wanted) -> ClientHandshake {
        ClientHandshake {
            wanted,
            state: State::Greeting,
            expected: 0,
            replies: 0,
            structured: false,
            contexts: Vec::new(),
            offered: Vec::new(),
            export: None,
            block_size: BlockSize::DEFAULT,
        }
    }

    /// Goes on. `input` is what the last step asked to read; empty at the beginning and after any other step.
    pub fn advance(&mut self, input: &[u8]) -> Result<Step, HandshakeError> {
        if input.len() != self.expected {
            return Err(Violation::Length { what: "what the handshake was given", length: input.len() as u64 }.into());
        }
        let step = if self.expected == 0 { self.without_input()? } else { self.with_input(input)? };
        self.expected = if let Step::Read(length) = step { length } else { 0 };
        Ok(step)
    }

    fn without_input(&mut self) -> Result<Step, HandshakeError> {
        Ok(match self.state {
            State::Greeting => Step::Read(GREETING_LENGTH),
            State::Header(_) => Step::Read(OPTION_REPLY_HEADER_LENGTH),
            State::StartedTls => self.ask(OptionRequest::StructuredReply, Vec::new()),
            State::Data(_) | State::Done => return Err(Violation::NoExportInfo.into()),
        })
    }

    fn with_input(&mut self, input: &[u8]) -> Result<Step, HandshakeError> {
        match self.state {
            State::Greeting => self.greeting(Greeting::decode(input)?),
            State::Header(asked) => {
                let header = OptionReplyHeader::decode(input)?;
                if header.option != asked {
                    let (expected, found) = (asked.number(), header.option.number());
                    return Err(Violation::WrongOption { expected, found }.into());
                }
                self.replies += 1;
                if self.replies > MAX_OPTION_REPLIES {
                    return Err(Violation::TooManyReplies { option: asked.number(), max: MAX_OPTION_REPLIES }.into());
                }
                self.state = State::Data(header);
                if header.length == 0 { self.reply(header, &[]) } else { Ok(Step::Read(header.length)) }
            }
            State::Data(header) => self.reply(header, input),
            State::StartedTls | State::Done => Err(Violation::NoExportInfo.into()),
        }
    }

    fn greeting(&mut self, greeting: Greeting) -> Result<Step, HandshakeError> {
        if !greeting.fixed_newstyle {
            return Err(Refusal::NotFixedNewstyle.into());
        }
        if !fits(&self.wanted.export) {
            return Err(Refusal::BadName.into());
        }
        let flags = ClientFlags { fixed_newstyle: true, no_zeroes: greeting.no_zeroes }.encode().to_vec();
        let first = if self.wanted.tls { OptionRequest::StartTls } else { OptionRequest::StructuredReply };
        Ok(self.ask(first, flags))
    }

    /// Sends an option after `before`.
    fn ask(&mut self, option: OptionRequest, mut before: Vec<u8>) -> Step {
        self.state = State::Header(option.kind());
        self.replies = 0;
        before.extend(option.encode());
        Step::Send(before)
    }

    /// Waits for the next reply to the same option.
    fn more(&mut self, header: OptionReplyHeader) -> Step {
        self.state = State::Header(header.option);
        Step::Read(OPTION_REPLY_HEADER_LENGTH)
    }

    fn reply(&mut self, header: OptionReplyHeader, data: &[u8]) -> Result<Step, HandshakeError> {
        let reply = OptionReply::decode(header.kind, data)?;
        if let OptionReply::Error { error, text } = reply {
            return self.refused(header.option, error, text);
        }
        let kind = header.kind;
        match (header.option, reply) {
            (OptionKind::StartTls, OptionReply::Ack) => {
                self.state = State::StartedTls;
                Ok(Step::StartTls)
            }
            (OptionKind::StructuredReply, OptionReply::Ack) => {
                self.structured = true;
                self.after_structured()
            }
            (OptionKind::SetMetaContext, OptionReply::MetaContext { id, name }) => {
                self.context(id, name)?;
                Ok(self.more(header))
            }
            (OptionKind::SetMetaContext, OptionReply::Ack) => self.after_contexts(),
            (OptionKind::ListMetaContext, OptionReply::MetaContext { name, .. }) => {
                if self.offered.len() < MAX_OFFERED {
                    self.offered.push(name);
                }
                Ok(self.more(header))
            }
            (OptionKind::ListMetaContext, OptionReply::Ack) => Err(self.no_context()),
            (OptionKind::Go, OptionReply::Info(info)) => {
                match info {
                    Info::Export { size, flags } => self.export = Some((size, flags)),
                    Info::BlockSize(size) => self.block_size = size,
                    Info::Name(_) | Info::Description(_) | Info::Other(_) => {}
                }
                Ok(self.more(header))
            }
            (OptionKind::Go, OptionReply::Ack) => self.done(),
            (option, _) => Err(Violation::UnexpectedReply { option: option.number(), kind }.into()),
        }
    }

    fn refused(&mut self, option: OptionKind, error: OptionError, text: String) -> Result<Step, HandshakeError> {
        let other = |what, text| Err(Refusal::Other { what, error, text }.into());
        match (option, error) {
            (OptionKind::StartTls, OptionError::Shutdown) => Err(Refusal::ShuttingDown.into()),
            (OptionKind::StartTls, error) => Err(Refusal::NoTls { error, text }.into()),
            (_, OptionError::TlsRequired) if self.wanted.tls => other("an export in spite of TLS", text),
            (_, OptionError::TlsRequired) => Err(Refusal::TlsRequired { text }.into()),
            (_, OptionError::Unknown) => Err(Refusal::NoSuchExport { text }.into()),
            (_, OptionError::Shutdown) => Err(Refusal::ShuttingDown.into()),
            // Servers may lack both.
            (OptionKind::StructuredReply, _) => self.after_structured(),
            (OptionKind::SetMetaContext, _) => {
                self.contexts.clear();
                self.after_contexts()
            }
            (OptionKind::ListMetaContext, _) => Err(self.no_context()),
            (OptionKind::Go, OptionError::Unsupported) => {
                other("NBD_OPT_GO, which servers have known since 2017", text)
            }
            _ => other("to open the export", text),
        }
    }

    fn after_structured(&mut self) -> Result<Step, HandshakeError> {
        if !self.structured || self.wanted.contexts.is_empty() {
            return self.after_contexts();
        }
        let queries = self.wanted.contexts.iter().map(|(name, _)| name.clone()).collect();
        let query = MetaQuery { export: self.wanted.export.clone(), queries };
        Ok(self.ask(OptionRequest::SetMetaContext(query), Vec::new()))
    }

    fn context(&mut self, id: u32, name: String) -> Result<(), Violation> {
        let is_meant =
            |wanted: &String| *wanted == name || (wanted.ends_with(':') && name.starts_with(wanted.as_str()));
        let wanted = self.wanted.contexts.iter().any(|(wanted, _)| is_meant(wanted));
        if !wanted || self.contexts.iter().any(|(_, known)| *known == name) {
            return Err(Violation::WrongContext { name });
        }
        if self.contexts.iter().any(|(known, _)| *known == id) {
            return Err(Violation::ContextIdTwice { id });
        }
        self.contexts.push((id, name));
        Ok(())
    }

    /// The first context that it must have and was not given.
    fn missing(&self) -> Option<&str> {
        let selected = |name: &str| self.contexts.iter().any(|(_, known)| known == name);
        let missing = self.wanted.contexts.iter().find(|(name, needed)| *needed && !selected(name));
        missing.map(|(name, _)| name.as_str())
    }

    fn after_contexts(&mut self) -> Result<Step, HandshakeError> {
        let export = self.wanted.export.clone();
        match self.missing() {
            None => {
                let wanted = vec![info::BLOCK_SIZE];
                Ok(self.ask(OptionRequest::Go(InfoRequest { export, wanted }), Vec::new()))
            }
            Some(_) if !self.structured => Err(self.no_context()),
            // Only to say what there is.
            Some(name) => {
                let namespace = name.split_inclusive(':').next().unwrap_or_default().to_owned();
                let query = MetaQuery { export, queries: vec![namespace] };
                Ok(self.ask(OptionRequest::ListMetaContext(query), Vec::new()))
            }
        }
    }

    fn no_context(&mut self) -> HandshakeError {
        let context = self.missing().unwrap_or_default().to_owned();
        Refusal::NoContext { context, offered: std::mem::take(&mut self.offered) }.into()
    }

    fn done(&mut self) -> Result<Step, HandshakeError> {
        let (size, flags) = self.export.ok_or(Violation::NoExportInfo)?;
        if !flags.contains(ExportFlags::HAS_FLAGS) {
            return Err(Violation::Value { what: "the export's flags", value: flags.0.into() }.into());
        }
        self.state = State::Done;
        let contexts = std::mem::take(&mut self.contexts);
        let (block_size, structured) = (self.block_size, self.structured);
        Ok(Step::Done(Opened { size, flags, block_size, structured, contexts }))
    }
}
