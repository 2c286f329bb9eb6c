//! An Ethernet address.

use std::fmt;
use std::str::FromStr;

use crate::text::serde_as_text;

/// The address of one Ethernet interface, written `52:54:00:12:34:56`: neither zero nor multicast.
///
/// ```
/// use bantam::virtio::net::MacAddr;
/// let mac: MacAddr = "52:54:00:12:34:5A".parse()?;
/// assert_eq!(mac.to_string(), "52:54:00:12:34:5a");
/// # Ok::<(), bantam::virtio::net::BadMac>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr([u8; 6]);

/// Why a text is not a [`MacAddr`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadMac {
    /// Not six hexadecimal bytes.
    #[error("not a MAC address: write six bytes as in 52:54:00:12:34:56")]
    Malformed,
    /// The address of a group of interfaces.
    #[error("a multicast MAC address cannot belong to an interface: make its first byte even")]
    Multicast,
    /// All zero.
    #[error("the MAC address 00:00:00:00:00:00 cannot belong to an interface")]
    Zero,
}

impl MacAddr {
    /// The address with these bytes.
    pub fn new(bytes: [u8; 6]) -> Result<Self, BadMac> {
        if bytes[0] & 1 != 0 {
            Err(BadMac::Multicast)
        } else if bytes == [0; 6] {
            Err(BadMac::Zero)
        } else {
            Ok(Self(bytes))
        }
    }

    /// A locally administered address that is always the same for the same `name`.
    pub fn from_name(name: &str) -> Self {
        // FNV-1a: it has to be the same for ever, which std's hashes do not promise.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }

    /// Its bytes, in the order they are sent and written.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(BadMac::Malformed)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(BadMac::Malformed);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMac::Malformed)?;
        }
        if parts.next().is_some() {
            return Err(BadMac::Malformed);
        }
        Self::new(bytes)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

serde_as_text!(MacAddr);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_address_of_an_interface_is_refused() {
        for text in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5", "52-54-00-12-34-56"] {
            assert_eq!(text.parse::<MacAddr>(), Err(BadMac::Malformed), "{text}");
        }
        for text in
            ["+2:54:00:12:34:56", "52:54:00:12:34:5g", "525:4:00:12:34:56", " 52:54:00:12:34:56", "5é:54:00:12:34:56"]
        {
            assert_eq!(text.parse::<MacAddr>(), Err(BadMac::Malformed), "{text}");
        }
        assert_eq!("01:00:5e:00:00:01".parse::<MacAddr>(), Err(BadMac::Multicast));
        assert_eq!("ff:ff:ff:ff:ff:ff".parse::<MacAddr>(), Err(BadMac::Multicast));
        assert_eq!("00:00:00:00:00:00".parse::<MacAddr>(), Err(BadMac::Zero));
    }

    #[test]
    fn the_address_of_a_name_stays() {
        assert_eq!(MacAddr::from_name("tap0").to_string(), MacAddr::from_name("tap0").to_string());
        assert_ne!(MacAddr::from_name("tap0"), MacAddr::from_name("tap1"));
    }

    proptest! {
        #[test]
        fn text_round_trips(bytes: [u8; 6]) {
            let text = bytes.map(|byte| format!("{byte:02X}")).join(":");
            match text.parse::<MacAddr>() {
                Ok(mac) => {
                    prop_assert_eq!(mac.bytes(), bytes);
                    prop_assert_eq!(mac.to_string(), text.to_lowercase());
                    let json = serde_json::to_string(&mac).unwrap();
                    prop_assert_eq!(serde_json::from_str::<MacAddr>(&json).unwrap(), mac);
                }
                Err(error) => prop_assert!(error != BadMac::Malformed && (bytes[0] & 1 == 1 || bytes == [0; 6])),
            }
        }

        #[test]
        fn no_text_panics(text: String) {
            if let Ok(mac) = text.parse::<MacAddr>() {
                prop_assert_eq!(mac.to_string(), text.to_lowercase());
            }
        }

        #[test]
        fn the_address_of_a_name_is_local_and_of_one_interface(name: String) {
            prop_assert_eq!(MacAddr::from_name(&name).bytes()[0] & 3, 2);
        }
    }
}
