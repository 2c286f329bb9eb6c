//! The header of every vsock packet: virtio 1.2, 5.10.6 (`struct virtio_vsock_hdr`).

/// Length of the header in bytes.
pub const HEADER: usize = 44;
/// The context ID of the host (5.10.4).
pub const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: whoever sends this will receive no more.
pub const RECEIVES_NO_MORE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: whoever sends this will send no more.
pub const SENDS_NO_MORE: u32 = 2;

/// `VIRTIO_VSOCK_OP_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Open a connection.
    Request = 1,
    /// The connection is open.
    Response = 2,
    /// There is no such connection, or no more.
    Rst = 3,
    /// One or both directions end.
    Shutdown = 4,
    /// Data.
    Rw = 5,
    /// What the header says of buffer space is news.
    CreditUpdate = 6,
    /// Please send a credit update.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        use Op::*;
        [Request, Response, Rst, Shutdown, Rw, CreditUpdate, CreditRequest]
            .into_iter()
            .find(|known| *known as u16 == op)
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context ID of the sender.
    pub src_cid: u64,
    /// Context ID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// `VIRTIO_VSOCK_TYPE_*`.
    pub kind: u16,
    /// What it is for; `None` if that is unknown.
    pub op: Option<Op>,
    /// Flags of the operation.
    pub flags: u32,
    /// The sender's buffer space for this connection, in bytes.
    pub buf_alloc: u32,
    /// How many bytes of this connection the sender has passed on, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// A header as it is in memory.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: Op::from_wire(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// The header as it is in memory.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_the_same_after_the_wire() {
        let bytes: [u8; HEADER] = std::array::from_fn(|at| match at {
            30 => 5, // VIRTIO_VSOCK_OP_RW
            31 => 0,
            _ => u8::try_from(at).unwrap(),
        });
        let header = Header::from_bytes(&bytes);
        assert_eq!((header.src_port, header.op, header.fwd_cnt), (0x1312_1110, Some(Op::Rw), 0x2b2a_2928));
        assert_eq!(header.to_bytes(), bytes);
        for unknown in [0, 8, 0x100, u16::MAX] {
            assert_eq!(Op::from_wire(unknown), None);
        }
    }
}
