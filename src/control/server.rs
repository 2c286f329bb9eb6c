//! The API's socket, and those who are connected to it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::api::{Api, Program};
use super::http::Connection;
use crate::socket::Listener;

/// The most clients at once: then the one that has said nothing for the longest makes room.
const CLIENTS_MAX: usize = 64;

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be made.
    #[error("cannot listen on the API's socket {}{}", .path.display(), hint(.source))]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host has no descriptors left.
    #[error("cannot wait for the API's clients")]
    Wait(#[source] io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ", which is there already: remove it, or give another path (--api-sock)",
        _ => "",
    }
}

/// Why a server has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// A machine was started.
    Started,
    /// A signal came.
    Signaled(i32),
    /// Somebody stopped it.
    Stopped,
}

/// Stops a server, from any thread.
#[derive(Debug, Clone)]
pub struct Stop(Arc<OwnedFd>);

impl Stop {
    /// The server returns.
    pub fn stop(&self) {
        // Fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Serves the API. Its socket is gone when it is dropped.
pub struct Server {
    listener: Listener,
    api: Api,
    /// The most bytes in a request's body.
    max: usize,
    /// Those who have said something last are at the end.
    clients: Vec<Connection>,
    stop: Arc<OwnedFd>,
}

impl Server {
    /// Listens at `path`, for requests whose bodies have at most `max` bytes.
    ///
    /// # Errors
    /// When something is there, or nothing can be made there.
    pub fn bind(path: &Path, api: Api, max: usize) -> Result<Self, Error> {
        let failed = |source| Error::Socket { path: path.to_owned(), source };
        let listener = Listener::create(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let stop =
            eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|error| Error::Wait(error.into()))?;
        Ok(Self { listener, api, max, clients: vec![], stop: Arc::new(stop) })
    }

    /// What stops it.
    pub fn stop(&self) -> Stop {
        Stop(self.stop.clone())
    }

    /// What it serves.
    pub fn api(&mut self) -> &mut Api {
        &mut self.api
    }

    /// Answers requests until it is stopped; with a `program`, also until a machine has started or a signal comes.
    ///
    /// # Errors
    /// When the host cannot wait.
    pub fn serve(&mut self, mut program: Option<&mut dyn Program>) -> Result<Served, Error> {
        loop {
            let ready = self.wait(program.as_deref().and_then(Program::signals))?;
            if ready.stop {
                return Ok(Served::Stopped);
            }
            let signal = ready.signal.then(|| program.as_deref().and_then(Program::signals)?.take()).flatten();
            if let Some(signal) = signal {
                return Ok(Served::Signaled(signal));
            }
            for index in ready.clients.into_iter().rev() {
                let mut client = self.clients.remove(index);
                self.talk(&mut client, &mut program);
                if !client.is_over() {
                    self.clients.push(client);
                }
            }
            if ready.listener {
                self.accept();
            }
            if program.is_some() && self.api.has_started() {
                return Ok(Served::Started);
            }
        }
    }

    /// Answers what a client has sent.
    fn talk(&mut self, client: &mut Connection, program: &mut Option<&mut dyn Program>) {
        if client.is_writing() {
            client.write();
        } else {
            client.read(self.max);
        }
        while !client.is_writing() {
            let Some(request) = client.request(self.max) else { break };
            let program: Option<&mut dyn Program> = match program {
                Some(program) => Some(&mut **program),
                None => None,
            };
            let response = self.api.respond(&request, program);
            client.answer(&request.method, &response);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            match Connection::new(stream) {
                Ok(client) => self.clients.push(client),
                Err(error) => log::warn!("cannot talk to a client of the API: {error}"),
            }
            if self.clients.len() > CLIENTS_MAX {
                self.clients.remove(0);
            }
        }
    }

    fn wait(&self, signals: Option<&crate::signal::SignalFd>) -> Result<Ready, Error> {
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = vec![readable(self.stop.as_fd()), readable(self.listener.as_fd())];
        fds.extend(self.clients.iter().map(|client| {
            let flags = if client.is_writing() { PollFlags::OUT } else { PollFlags::IN };
            PollFd::from_borrowed_fd(client.stream().as_fd(), flags)
        }));
        fds.extend(signals.map(|signals| readable(signals.as_fd())));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            polled => polled.map_err(|error| Error::Wait(error.into()))?,
        };
        let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let first = 2;
        Ok(Ready {
            stop: is_ready(0),
            listener: is_ready(1),
            clients: (0..self.clients.len()).filter(|index| is_ready(first + index)).collect(),
            signal: is_ready(first + self.clients.len()),
        })
    }
}

#[derive(Default)]
struct Ready {
    stop: bool,
    listener: bool,
    clients: Vec<usize>,
    signal: bool,
}
