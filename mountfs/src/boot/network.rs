//! What a guest may reach, and who reaches it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Longest name of a network interface of Linux.
const MAX_INTERFACE: usize = 15;

/// A network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Network {
    /// No adapter at all.
    #[default]
    None,
    /// An adapter behind QEMU's own address translation; restricted: the guest reaches nothing.
    User { restricted: bool },
    /// A bridge of this host's, through QEMU's helper.
    Bridge(String),
    /// A tap interface that is there.
    Tap(String),
}

impl Network {
    /// Parses what `--network` says.
    pub fn parse(text: &str) -> Result<Network, String> {
        let interface = |name: &str| {
            let fits = (1..=MAX_INTERFACE).contains(&name.len()) && name != "." && name != "..";
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            match fits && name.chars().all(plain) {
                true => Ok(name.to_owned()),
                false => Err(format!("{name:?} is no name of a network interface")),
            }
        };
        match text.split_once('=') {
            None if text == "none" => Ok(Network::None),
            None if text == "restricted" => Ok(Network::User { restricted: true }),
            None if text == "user" => Ok(Network::User { restricted: false }),
            Some(("bridge", name)) => interface(name).map(Network::Bridge),
            Some(("tap", name)) => interface(name).map(Network::Tap),
            _ => Err("it is none, restricted, user, bridge=NAME or tap=NAME".into()),
        }
    }
}

/// A port of this host that leads to one of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    pub host: SocketAddr,
    pub guest: u16,
}

impl Forward {
    /// Parses `[ADDRESS:]PORT:PORT`; without an address, only this host gets there.
    pub fn parse(text: &str) -> Result<Forward, String> {
        let wrong = || "it is HOST-PORT:GUEST-PORT, or ADDRESS:HOST-PORT:GUEST-PORT".to_owned();
        let (host, guest) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        let here = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let host = port(host).map(here).or_else(|| host.parse().ok()).ok_or_else(wrong)?;
        match (host, port(guest)) {
            // QEMU takes no other here.
            (SocketAddr::V4(_), Some(guest)) if host.port() > 0 => Ok(Forward { host, guest }),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_forwards_are_parsed_and_nothing_else_gets_through() {
        assert_eq!(Network::parse("none"), Ok(Network::None));
        assert_eq!(Network::parse("restricted"), Ok(Network::User { restricted: true }));
        assert_eq!(Network::parse("bridge=br-0.7"), Ok(Network::Bridge("br-0.7".into())));
        assert_eq!(Network::parse("tap=tap0"), Ok(Network::Tap("tap0".into())));
        for bad in ["", "bridge", "bridge=", "bridge=a,b", "tap=../x", "tap=0123456789abcdef", "user=x", "None"] {
            assert!(Network::parse(bad).is_err(), "{bad}");
        }
        let forward = Forward::parse("2222:22").unwrap();
        assert_eq!((forward.host.to_string().as_str(), forward.guest), ("127.0.0.1:2222", 22));
        assert_eq!(Forward::parse("0.0.0.0:80:8080").unwrap().host.to_string(), "0.0.0.0:80");
        for bad in ["", "22", "0:22", "22:0", "a:22", "22:22,x", "[::1]:22:22", "127.0.0.1:0:22"] {
            assert!(Forward::parse(bad).is_err(), "{bad}");
        }
    }
}
