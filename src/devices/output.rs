//! What the guest writes to its console, on its way to the host.
//!
//! A vCPU puts one byte at a time into a bounded buffer; a thread of its own takes what has gathered and writes it, so
//! that there is no write(2) per byte, and no vCPU waits for the host's reader until the buffer is full. Then it does
//! wait: a slow reader slows the guest down, as a pipe does to any program, and nothing is lost. A reader that is gone
//! stops nothing: the rest is dropped. The thread begins with the first byte: a guest is not waited for that says nothing.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::transcript::{Sight, Transcript};
use crate::sandbox::{Role, Sandbox};

/// Bytes that may wait for the writer.
const CAPACITY: usize = 16 << 10;
/// How long the first byte of a batch waits for company: less than a person notices.
const LINGER: Duration = Duration::from_millis(2);
/// A batch of this many bytes does not wait.
const FULL_BATCH: usize = 4 << 10;

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// Nothing more will come.
    closed: bool,
    /// Whoever has no room drops instead of waiting.
    released: bool,
    /// The writer, until there is something to write.
    idle: Option<Idle>,
}

/// A thread that has not begun. One that never does ends when this is dropped.
struct Idle {
    /// Has somebody [begin](Output::begin) it.
    wanted: Box<dyn Fn() + Send>,
    begin: Box<dyn FnOnce() -> io::Result<JoinHandle<()>> + Send>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    transcript: Mutex<Transcript>,
    /// The writer has something to do.
    work: Condvar,
    /// There is room again.
    room: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's end: a [`Write`]r that never fails. Clones write to the same console.
#[derive(Clone, Default)]
pub struct Output(Arc<Shared>);

impl Output {
    /// Prepares the thread that writes to `host`; `wanted` is called when there is something to write, and has somebody
    /// [begin](Self::begin) it. It tells `on_sight` what it recognises. `on_end` is called when, after
    /// [`Output::close`], all is written, or when `host` panicked.
    /// The thread is in `sandbox`.
    pub fn prepare(
        &self,
        host: Box<dyn Write + Send>,
        sandbox: &Sandbox,
        wanted: impl Fn() + Send + 'static,
        on_sight: impl Fn(Sight) + Send + 'static,
        on_end: impl FnOnce() + Send + 'static,
    ) {
        let end = End { output: self.clone(), on_end: Some(on_end) };
        let sandbox = sandbox.clone();
        let pump = move || match sandbox.enter(Role::Stream) {
            Ok(()) => end.output.0.pump(host, on_sight),
            Err(error) => log::error!("cannot restrict the console's thread: {error}"),
        };
        let begin = || crate::threads::named("bantam-console".into()).spawn(pump);
        self.0.state().idle = Some(Idle { wanted: Box::new(wanted), begin: Box::new(begin) });
    }

    /// Begins the thread, if it is prepared and has not begun.
    ///
    /// # Errors
    /// When the host has no thread. Then it has ended.
    pub fn begin(&self) -> io::Result<Option<JoinHandle<()>>> {
        let idle = self.0.state().idle.take();
        idle.map(|idle| (idle.begin)()).transpose()
    }

    /// Nothing more will come: once all is written the thread ends.
    pub fn close(&self) {
        let mut state = self.0.state();
        state.closed = true;
        let unused = if state.waiting.is_empty() { state.idle.take() } else { None };
        drop(state);
        self.0.work.notify_all();
        drop(unused);
    }

    /// From now on a byte that finds no room is dropped, so that nobody waits for the host's reader.
    pub fn release(&self) {
        self.0.state().released = true;
        self.0.room.notify_all();
    }

    /// The last lines that the guest wrote, oldest first.
    pub fn tail(&self) -> Vec<String> {
        self.0.transcript.lock().unwrap_or_else(PoisonError::into_inner).tail()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state();
        while state.waiting.len() + bytes.len() > CAPACITY && !state.released {
            state = self.0.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.waiting.len() + bytes.len() <= CAPACITY {
            let before = state.waiting.len();
            state.waiting.extend_from_slice(bytes);
            if before == 0
                && let Some(idle) = &state.idle
            {
                (idle.wanted)();
            }
            if before == 0 || (before < FULL_BATCH && state.waiting.len() >= FULL_BATCH) {
                self.0.work.notify_one();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The end of the writer's thread, whatever ended it: nobody waits for it any more.
struct End<F: FnOnce()> {
    output: Output,
    on_end: Option<F>,
}

impl<F: FnOnce()> Drop for End<F> {
    fn drop(&mut self) {
        self.output.release();
        if let Some(on_end) = self.on_end.take() {
            on_end();
        }
    }
}

impl Shared {
    fn pump(&self, mut host: Box<dyn Write + Send>, on_sight: impl Fn(Sight)) {
        let mut host_is_there = true;
        let mut batch = Vec::new();
        while self.take(&mut batch) {
            self.transcript.lock().unwrap_or_else(PoisonError::into_inner).feed(&batch, &on_sight);
            if host_is_there && let Err(error) = host.write_all(&batch).and_then(|()| host.flush()) {
                host_is_there = false;
                if error.kind() == io::ErrorKind::BrokenPipe {
                    log::info!("console: nobody reads it any more");
                } else {
                    log::warn!("cannot write to the console, going on without it: {error}");
                }
            }
            batch.clear();
        }
    }

    /// Waits for bytes and takes them all into `batch`; false when there will be no more.
    fn take(&self, batch: &mut Vec<u8>) -> bool {
        let idle = |state: &mut State| state.waiting.is_empty() && !state.closed;
        let gathering = |state: &mut State| state.waiting.len() < FULL_BATCH && !state.closed;
        let state = self.work.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
        let (mut state, _) =
            self.work.wait_timeout_while(state, LINGER, gathering).unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut state.waiting, batch);
        self.room.notify_all();
        !batch.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Collects what is written, and how often.
    #[derive(Clone, Default)]
    struct Host(Arc<Mutex<(Vec<u8>, usize)>>);
    impl Write for Host {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut seen = self.0.lock().unwrap();
            seen.0.extend_from_slice(bytes);
            seen.1 += 1;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn start(output: &Output, host: impl Write + Send + 'static) -> mpsc::Receiver<()> {
        let (ended, end) = mpsc::channel();
        output.prepare(Box::new(host), &Sandbox::default(), || (), |_| (), move || ended.send(()).unwrap());
        output.begin().unwrap().expect("it has not begun");
        end
    }

    #[test]
    fn the_thread_is_wanted_with_the_first_byte() {
        let (mut output, host) = (Output::default(), Host::default());
        let ((want, wanted), (ended, end)) = (mpsc::channel(), mpsc::channel());
        let want = move || want.send(()).unwrap();
        output.prepare(Box::new(host.clone()), &Sandbox::default(), want, |_| (), move || ended.send(()).unwrap());
        assert!(wanted.try_recv().is_err());
        output.write_all(b"x").unwrap();
        output.write_all(b"y").unwrap();
        output.close();
        assert!(wanted.try_recv().is_ok() && wanted.try_recv().is_err(), "once");
        assert!(end.try_recv().is_err(), "it has to be written");
        assert!(output.begin().unwrap().is_some() && output.begin().unwrap().is_none());
        end.recv().unwrap();
        assert_eq!(host.0.lock().unwrap().0, b"xy");
    }

    #[test]
    fn a_thread_that_nobody_wanted_ends_at_once() {
        let output = Output::default();
        let (ended, end) = mpsc::channel();
        output.prepare(
            Box::new(Host::default()),
            &Sandbox::default(),
            || panic!("nothing was written"),
            |_| (),
            move || ended.send(()).unwrap(),
        );
        output.close();
        assert!(end.try_recv().is_ok() && output.begin().unwrap().is_none());
    }

    #[test]
    fn all_is_written_in_order_and_in_batches() {
        let (mut output, host) = (Output::default(), Host::default());
        let end = start(&output, host.clone());
        let text: Vec<u8> = (0..200_000u32).map(|i| i.to_le_bytes()[0]).collect();
        for byte in &text {
            output.write_all(&[*byte]).unwrap();
        }
        output.close();
        end.recv().unwrap();
        let seen = host.0.lock().unwrap();
        assert!(seen.0 == text);
        assert!(seen.1 < text.len() / 100, "{} writes", seen.1);
    }

    #[test]
    fn a_reader_that_is_gone_stops_nothing() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut output = Output::default();
        let end = start(&output, writer);
        output.write_all(&[b'x'; 3 * CAPACITY / 4]).unwrap();
        output.write_all(&[b'y'; 3 * CAPACITY / 4]).unwrap();
        output.close();
        end.recv().unwrap();
    }

    #[test]
    fn a_host_that_panics_stops_nothing() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                panic!("as the test wants it")
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut output = Output::default();
        let end = start(&output, Broken);
        for _ in 0..3 {
            output.write_all(&[b'x'; CAPACITY]).unwrap();
        }
        end.recv().unwrap();
    }

    #[test]
    fn a_writer_without_room_waits_until_released() {
        // Never started: nobody makes room.
        let mut output = Output::default();
        output.write_all(&[b'x'; CAPACITY]).unwrap();
        let mut second = output.clone();
        let blocked = std::thread::spawn(move || second.write_all(b"y"));
        output.release();
        blocked.join().unwrap().unwrap();
        assert_eq!(output.0.state().waiting.len(), CAPACITY);
    }
}
