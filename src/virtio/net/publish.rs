//! A port of the host behind which a port of the guest is.

use std::fmt;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::num::NonZeroU16;
use std::str::FromStr;

use crate::text::serde_as_text;

/// A published port: `[ADDR:]HOSTPORT:GUESTPORT[/udp]`. Without an address it is there on all of the host's.
///
/// ```
/// use bantam::virtio::net::Publish;
/// let port: Publish = "127.0.0.1:8080:80".parse()?;
/// assert_eq!(port.to_string(), "127.0.0.1:8080:80");
/// # Ok::<(), bantam::virtio::net::BadPublish>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish {
    /// The host's address.
    pub address: Option<Ipv4Addr>,
    /// The host's port.
    pub host: NonZeroU16,
    /// The guest's port.
    pub guest: NonZeroU16,
    /// Whether it is a UDP port; else a TCP port.
    pub udp: bool,
}

/// Text that is no [`Publish`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot publish `{text}`: {why}; expected [ADDR:]HOSTPORT:GUESTPORT[/udp], such as 8080:80 or 127.0.0.1:5353:53/udp"
)]
pub struct BadPublish {
    text: String,
    why: &'static str,
}

impl Publish {
    /// Tries to have the host's port.
    pub(super) fn try_bind(&self) -> std::io::Result<()> {
        let address = (self.address.unwrap_or(Ipv4Addr::UNSPECIFIED), self.host.get());
        if self.udp { UdpSocket::bind(address).map(drop) } else { TcpListener::bind(address).map(drop) }
    }
}

impl FromStr for Publish {
    type Err = BadPublish;

    fn from_str(text: &str) -> Result<Self, BadPublish> {
        let bad = |why| BadPublish { text: text.to_owned(), why };
        let (ports, udp) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), false),
            Some((ports, "udp")) => (ports, true),
            Some(_) => return Err(bad("its protocol is neither tcp nor udp")),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or(bad("it names no port of the guest"))?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                (Some(address.parse().map_err(|_| bad("its address is not an IPv4 address"))?), host)
            }
            None => (None, rest),
        };
        let port = |text: &str| text.parse().map_err(|_| bad("a port is not a number from 1 to 65535"));
        Ok(Self { address, host: port(host)?, guest: port(guest)?, udp })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address}:")?;
        }
        write!(f, "{}:{}{}", self.host, self.guest, if self.udp { "/udp" } else { "" })
    }
}

serde_as_text!(Publish);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ports_and_the_rest_are_told_apart() {
        for (text, address, host, guest, udp) in [
            ("8080:80", None, 8080, 80, false),
            ("8080:80/tcp", None, 8080, 80, false),
            ("53:53/udp", None, 53, 53, true),
            ("127.0.0.1:1:65535", Some(Ipv4Addr::LOCALHOST), 1, 65535, false),
        ] {
            let port: Publish = text.parse().unwrap();
            assert_eq!((port.address, port.host.get(), port.guest.get(), port.udp), (address, host, guest, udp));
            assert_eq!(port.to_string().parse::<Publish>().unwrap(), port);
        }
    }

    #[test]
    fn other_text_is_refused_with_the_form() {
        for (text, why) in [
            ("", "no port of the guest"),
            ("80", "no port of the guest"),
            ("0:80", "1 to 65535"),
            ("80:0", "1 to 65535"),
            ("80:65536", "1 to 65535"),
            ("80:http", "1 to 65535"),
            (":80", "1 to 65535"),
            ("localhost:80:80", "IPv4"),
            ("[::1]:80:80", "IPv4"),
            ("::80:80", "IPv4"),
            ("80:80/sctp", "neither tcp nor udp"),
            ("80:80/tcp/tcp", "neither"),
        ] {
            let error = text.parse::<Publish>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("expected [ADDR:]HOSTPORT"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "[0-9.:/a-z]{0,24}|\\PC{0,24}") {
            if let Ok(port) = text.parse::<Publish>() {
                prop_assert_eq!(port.to_string().parse(), Ok(port));
            }
        }
    }
}
