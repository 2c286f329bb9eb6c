//! The serial port: a 16550A UART by vm-superio, with what bantam adds around it.
//!
//! What the guest sends goes to a [`Write`]r, a byte at a time: it is that writer's business to batch. What the guest
//! is sent waits until its driver listens, because one that starts up or shuts down throws away what has arrived.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_superio::Trigger;
use vm_superio::serial::{Serial as Uart, SerialEvents};

use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::limit::{Bucket, Limit};
use crate::metrics::Counter;
use crate::snapshot::{self, Hex};

/// Receiver Buffer Register.
const RBR: u8 = 0;
/// Transmitter Holding Register.
const THR: u64 = 0;
/// Interrupt Enable Register.
const IER: u64 = 1;
/// Interrupt Identification Register.
const IIR: u64 = 2;
/// Line Control Register.
const LCR: u64 = 3;
/// Modem Control Register.
const MCR: u64 = 4;
/// Line Status Register.
const LSR: u8 = 5;
/// Scratch Register.
const SCR: u64 = 7;
/// IER: interrupt when data has arrived; a driver that listens has it set.
const IER_RECEIVED_DATA: u8 = 1;
/// IER: interrupt when data can be sent.
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
/// LCR: offsets 0 and 1 are the baud rate divisor.
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
/// LSR: there is something in the RBR.
const LSR_DATA_READY: u8 = 1;

/// The most input that is waiting, in bytes: what was in the FIFO when the driver stopped to listen, and what it has looped
/// back since.
const INPUT_MAX: usize = 128;

/// What the port has done.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counts {
    /// Bytes that the guest sent.
    written_bytes: Counter,
    /// Bytes that it was sent, and read.
    read_bytes: Counter,
    /// Bytes that it sent, and that were over the limit.
    dropped_bytes: Counter,
    /// Bytes that could not be written.
    errors: Counter,
}

/// What the guest sends, as far as the limit allows.
struct Limited<W> {
    output: W,
    bucket: Option<Bucket>,
    counts: Arc<Counts>,
}

impl<W: Write> Write for Limited<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(bucket) = &mut self.bucket {
            let now = Instant::now();
            if !bucket.wait(now).is_zero() {
                self.counts.dropped_bytes.add(bytes.len() as u64);
                return Ok(bytes.len());
            }
            bucket.take(bytes.len() as u64, now);
        }
        self.counts.written_bytes.add(bytes.len() as u64);
        self.output.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

struct Line(Box<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

struct Room<F> {
    /// Input was refused since the last call.
    wanted: Cell<bool>,
    on_room: F,
    counts: Arc<Counts>,
}

impl<F: Fn()> SerialEvents for Room<F> {
    fn in_buffer_empty(&self) {
        if self.wanted.take() {
            (self.on_room)();
        }
    }
    fn buffer_read(&self) {
        self.counts.read_bytes.inc();
    }
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
}

/// Has the host gather what the guest sends, until it reads a register. Then all of that is sent first.
pub trait Gather: Send {
    /// From now on.
    fn start(&mut self);
    /// No more.
    fn stop(&mut self);
}

/// A driver that waits for no interrupts. What it sends may be gathered if it looks at the line status after its last byte.
struct Sending {
    gather: Box<dyn Gather>,
    last: Last,
}

/// What it did last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Nothing,
    /// Sent a byte,
    Byte,
    /// and then looked, maybe before the next one.
    Look,
    /// And looked once more: so it had looked after the last one.
    Gathered,
}

impl Sending {
    fn sent(&mut self) {
        if self.last != Last::Gathered {
            self.last = Last::Byte;
        }
    }

    fn looked(&mut self) {
        self.last = match self.last {
            Last::Byte => Last::Look,
            Last::Look => {
                self.gather.start();
                Last::Gathered
            }
            last => last,
        };
    }

    fn ends(mut self) {
        if self.last == Last::Gathered {
            self.gather.stop();
        }
    }
}

/// A serial port at eight consecutive ports.
pub struct Serial<W: Write, F: Fn()> {
    uart: Uart<Line, Room<F>, Limited<W>>,
    divisor_latch: bool,
    listening: bool,
    /// There until the driver waits for interrupts.
    sending: Option<Sending>,
    /// What the driver was sent and did not read before it stopped to listen.
    unread: Vec<u8>,
}

impl<W: Write, F: Fn()> Serial<W, F> {
    /// A port that interrupts by `line` and sends to `output`. Once it had no room for input it calls
    /// `on_room` when it may have some again.
    pub fn new(line: impl Interrupt + 'static, output: W, on_room: F) -> Self {
        let counts = Arc::<Counts>::default();
        let output = Limited { output, bucket: None, counts: counts.clone() };
        let uart = Uart::with_events(Line(Box::new(line)), Room { wanted: Cell::new(true), on_room, counts }, output);
        Self { uart, divisor_latch: false, listening: false, sending: None, unread: Vec::new() }
    }

    /// Drops what the guest sends beyond this.
    pub fn limit(&mut self, limit: Limit) {
        self.uart.writer_mut().bucket = Some(Bucket::new(limit, Instant::now()));
    }

    /// Has what the guest sends be gathered while its driver looks at the line status for what it has sent.
    pub fn gather(&mut self, gather: impl Gather + 'static) {
        self.sending = Some(Sending { gather: Box::new(gather), last: Last::Nothing });
    }

    /// What it counts.
    pub fn counts(&self) -> Arc<Counts> {
        self.uart.writer().counts.clone()
    }

    /// How many bytes the guest can be sent now.
    pub fn room(&self) -> usize {
        let room = if self.listening { self.uart.fifo_capacity() } else { 0 };
        self.uart.events().wanted.set(room == 0);
        room
    }

    /// Sends the guest as much of `input` as there is room for; returns how much that was.
    pub fn send(&mut self, input: &[u8]) -> usize {
        let input = &input[..input.len().min(self.room())];
        match self.uart.enqueue_raw_bytes(input) {
            Ok(sent) => sent,
            Err(error) => {
                log::error!("serial port: {error:?}");
                input.len()
            }
        }
    }
}

impl<W: Write + Send, F: Fn() + Send> BusDevice for Serial<W, F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = self.uart.read(offset.to_le_bytes()[0]);
        if offset == u64::from(LSR) {
            self.sending.iter_mut().for_each(Sending::looked);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            THR if !self.divisor_latch => self.sending.iter_mut().for_each(Sending::sent),
            IER if !self.divisor_latch && data[0] & (IER_RECEIVED_DATA | IER_TRANSMITTER_EMPTY) != 0 => {
                self.sending.take().into_iter().for_each(Sending::ends);
            }
            _ => {}
        }
        // The writer has its errors.
        if self.uart.write(offset.to_le_bytes()[0], data[0]).is_err() {
            self.uart.writer().counts.errors.inc();
        }
        match offset {
            LCR => self.divisor_latch = data[0] & LCR_DIVISOR_LATCH != 0,
            IER if !self.divisor_latch => {
                let listened = std::mem::replace(&mut self.listening, data[0] & IER_RECEIVED_DATA != 0);
                match (listened, self.listening) {
                    (false, true) => {
                        self.uart.events().in_buffer_empty();
                        let unread = std::mem::take(&mut self.unread);
                        self.send(&unread);
                    }
                    (true, false) => {
                        while self.uart.read(LSR) & LSR_DATA_READY != 0 {
                            self.unread.push(self.uart.read(RBR));
                        }
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// An interrupt may have been lost on the way to where it is now; one too many does no harm.
    fn resume(&mut self) {
        let state = self.uart.state();
        let [ier, iir, lcr] = [IER, IIR, LCR].map(|register| register.to_le_bytes()[0]);
        // What is pending counts as told; it is told again when it is enabled again.
        self.uart.read(iir);
        let writes = [(lcr, 0), (ier, state.interrupt_enable), (lcr, state.line_control)];
        for (register, value) in writes {
            let _ = self.uart.write(register, value);
        }
    }

    fn save(&mut self) -> Value {
        let state = self.uart.state();
        let divisor = [state.baud_divisor_low, state.baud_divisor_high];
        let [ier, lcr] = [state.interrupt_enable, state.line_control];
        let [mcr, scr] = [state.modem_control, state.scratch];
        let input = Hex([state.in_buffer, self.unread.clone()].concat());
        let state = State { divisor, ier, lcr, mcr, scr, input };
        serde_json::to_value(state).expect("numbers and text are JSON")
    }

    fn restore(&mut self, state: &Value) -> Result<(), snapshot::Error> {
        let fail = |error: serde_json::Error| snapshot::Error::part("the serial port", error);
        let state = State::deserialize(state).map_err(fail)?;
        if state.input.0.len() > INPUT_MAX {
            return Err(snapshot::Error::part(
                "the serial port",
                format_args!("it has {} bytes of input", state.input.0.len()),
            ));
        }
        // As a driver would set it up, which has what arrived when it listens.
        self.write(LCR, &[LCR_DIVISOR_LATCH]);
        self.write(0, &state.divisor[..1]);
        self.write(IER, &state.divisor[1..]);
        self.write(LCR, &[0]);
        self.unread = state.input.0;
        for (register, value) in [(IER, state.ier), (LCR, state.lcr), (MCR, state.mcr), (SCR, state.scr)] {
            self.write(register, &[value]);
        }
        Ok(())
    }
}

/// The registers that the driver writes, and the input that it has not read.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    divisor: [u8; 2],
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    input: Hex,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use vmm_sys_util::eventfd::EventFd;

    impl Interrupt for EventFd {
        fn trigger(&self) -> io::Result<()> {
            self.write(1)
        }
    }

    #[test]
    fn input_waits_for_a_driver_that_listens() {
        let rooms = AtomicU32::new(0);
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let on_room = || {
            rooms.fetch_add(1, Ordering::SeqCst);
        };
        let mut serial = Serial::new(line.try_clone().unwrap(), Vec::new(), on_room);
        assert_eq!(serial.send(b"early"), 0);
        serial.write(IER, &[IER_RECEIVED_DATA]);
        assert_eq!(rooms.load(Ordering::SeqCst), 1);
        assert_eq!(serial.send(&[b'x'; 100]), 64, "the FIFO holds 64");
        assert_eq!(serial.send(b"more"), 0);
        assert!(line.read().is_ok(), "interrupted");
        for _ in 0..64 {
            let mut byte = [0];
            serial.read(0, &mut byte);
            assert_eq!(byte, *b"x");
        }
        assert_eq!((rooms.load(Ordering::SeqCst), serial.room()), (2, 64));
    }

    #[test]
    fn a_driver_that_shuts_down_and_starts_again_loses_nothing() {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut serial = Serial::new(line.try_clone().unwrap(), Vec::new(), || ());
        let read = |serial: &mut Serial<_, _>| {
            let mut byte = [0];
            serial.read(0, &mut byte);
            byte[0]
        };
        serial.write(IER, &[IER_RECEIVED_DATA]);
        assert_eq!(serial.send(b"echo"), 4);
        assert_eq!(read(&mut serial), b'e');
        // As Linux does, which also does so for each message of its own.
        serial.write(IER, &[0]);
        for _ in 0..3 {
            assert_eq!(read(&mut serial), 0);
        }
        line.read().unwrap();
        serial.write(IER, &[IER_RECEIVED_DATA]);
        line.read().expect("interrupted again");
        assert_eq!([(); 3].map(|()| read(&mut serial)), *b"cho");
    }

    #[test]
    fn what_has_arrived_arrives_elsewhere() {
        let new = || {
            let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            (line.try_clone().unwrap(), Serial::new(line, Vec::new(), || ()))
        };
        let (_, mut serial) = new();
        serial.write(LCR, &[LCR_DIVISOR_LATCH]);
        serial.write(0, &[12]);
        serial.write(LCR, &[3]);
        serial.write(IER, &[IER_RECEIVED_DATA]);
        assert_eq!(serial.send(b"input"), 5);
        serial.write(MCR, &[0x0b]);
        serial.write(SCR, &[0x5a]);
        let (line, mut other) = new();
        let state = serial.save();
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        let _ = line.read();
        other.resume();
        assert!(line.read().is_ok(), "interrupted");
        // With the divisor latch, too, behind which the interrupts are.
        other.write(LCR, &[LCR_DIVISOR_LATCH | 3]);
        other.resume();
        assert!(line.read().is_ok(), "interrupted");
        assert_eq!(other.uart.state().line_control, LCR_DIVISOR_LATCH | 3);
        other.write(LCR, &[3]);
        let read = [0, 0, 0, 0, 0, MCR, SCR].map(|register| {
            let mut byte = [0];
            other.read(register, &mut byte);
            byte[0]
        });
        assert_eq!(read, *b"input\x0b\x5a");
        assert_eq!((other.room(), other.uart.state().baud_divisor_low), (64, 12));
        assert!(other.restore(&serde_json::json!({"ier": 1})).is_err());
        let mut state = state;
        state["input"] = "00".repeat(INPUT_MAX + 1).into();
        assert!(other.restore(&state).is_err());
    }

    #[test]
    fn the_divisor_latch_is_not_taken_for_the_interrupt_enable_register() {
        let mut serial = Serial::new(EventFd::new(0).unwrap(), Vec::new(), || ());
        serial.write(LCR, &[LCR_DIVISOR_LATCH]);
        serial.write(IER, &[1]);
        assert_eq!(serial.room(), 0);
        serial.write(LCR, &[3]);
        serial.write(0, b"A");
        assert_eq!(serial.uart.writer().output, b"A");
    }

    /// Notes what is asked of it.
    struct Noted(Arc<Mutex<Vec<&'static str>>>);

    impl Gather for Noted {
        fn start(&mut self) {
            self.0.lock().unwrap().push("start");
        }
        fn stop(&mut self) {
            self.0.lock().unwrap().push("stop");
        }
    }

    #[test]
    fn bytes_are_gathered_of_a_driver_that_looks_after_the_last_one() {
        let new = || {
            let mut serial = Serial::new(EventFd::new(0).unwrap(), Vec::new(), || ());
            let noted = Arc::default();
            serial.gather(Noted(Arc::clone(&noted)));
            (serial, noted)
        };
        let look = |serial: &mut Serial<_, _>| serial.read(LSR.into(), &mut [0]);
        let (mut serial, noted) = new();
        // It looks before each byte only, which leaves the last one to nobody; and may look as often as it wants before the first.
        look(&mut serial);
        look(&mut serial);
        for _ in 0..3 {
            look(&mut serial);
            serial.write(THR, b"a");
        }
        serial.write(IER, &[0]);
        assert!(noted.lock().unwrap().is_empty());
        // Linux looks after the last byte of a line, and before the first of the next.
        look(&mut serial);
        look(&mut serial);
        assert_eq!(*noted.lock().unwrap(), ["start"]);
        serial.write(THR, b"b");
        look(&mut serial);
        look(&mut serial);
        serial.write(IER, &[IER_TRANSMITTER_EMPTY]);
        assert_eq!(*noted.lock().unwrap(), ["start", "stop"]);
        serial.write(THR, b"c");
        look(&mut serial);
        look(&mut serial);
        serial.write(IER, &[IER_TRANSMITTER_EMPTY]);
        assert_eq!(*noted.lock().unwrap(), ["start", "stop"], "for good");
        // With interrupts from the start, it is never.
        let (mut serial, noted) = new();
        serial.write(IER, &[IER_RECEIVED_DATA]);
        serial.write(THR, b"a");
        look(&mut serial);
        look(&mut serial);
        assert!(noted.lock().unwrap().is_empty());
    }

    #[test]
    fn what_is_over_the_limit_is_dropped_and_counted() {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut serial = Serial::new(line, Vec::new(), || ());
        serial.limit("4/1h+2".parse().unwrap());
        b"0123456789".iter().for_each(|byte| serial.write(0, &[*byte]));
        // One more may begin when nothing is owed.
        assert_eq!(serial.uart.writer().output, b"0123456");
        let expected = serde_json::json!({"written-bytes": 7, "read-bytes": 0, "dropped-bytes": 3, "errors": 0});
        assert_eq!(serde_json::to_value(&*serial.counts()).unwrap(), expected);
    }
}
