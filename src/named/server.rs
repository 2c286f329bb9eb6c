//! The machine's end of its control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use super::{About, Error, Name, Request, Watchers, make_folder};
use crate::config::Config;
use crate::machine::{Destination, Handle};
use crate::sandbox::{Role, Sandbox};
use crate::socket::Listener;

/// The most clients at once.
const CLIENTS_MAX: usize = 64;
/// The most bytes in a request.
const REQUEST_MAX: u64 = 16 << 10;

/// A machine's control socket, which is gone when this is dropped.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
    serving: bool,
}

#[derive(Debug)]
struct Shared {
    about: About,
    /// Whether the guest is asked to end by its keyboard: it has one, and no command.
    keyboard: bool,
    /// Whether its process sees no folders.
    is_jailed: bool,
    /// Whether it has a command, which is.
    command: bool,
    started: Instant,
    handle: Mutex<Option<Handle>>,
    watchers: Watchers,
    clients: AtomicUsize,
}

impl Server {
    /// Listens for what is asked of the machine `name`, which `config` makes. Nobody is answered before it is
    /// [served](Self::serve).
    ///
    /// # Errors
    /// When a machine of that name runs, or there can be no socket.
    pub fn bind(name: &Name, config: &Config, started: Instant) -> Result<Self, Error> {
        Self::bind_for(name, config, started, false)
    }

    /// The same for a machine whose process will see no folders, as it is in a jail.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_jailed(name: &Name, config: &Config, started: Instant) -> Result<Self, Error> {
        Self::bind_for(name, config, started, true)
    }

    fn bind_for(name: &Name, config: &Config, started: Instant, is_jailed: bool) -> Result<Self, Error> {
        let path = make_folder()?.join(name.to_string());
        let listener = Listener::bind(&path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => Error::InUse(name.clone()),
            _ => Error::Bind { name: name.clone(), source },
        })?;
        let about = About {
            name: name.clone(),
            pid: std::process::id(),
            paused: false,
            uptime_seconds: 0,
            cpus: config.cpus,
            memory: config.memory.get(),
            kernel: config.kernel.clone().unwrap_or_default(),
        };
        let handle = Mutex::default();
        let (watchers, clients) = (Watchers::default(), AtomicUsize::new(0));
        let command = config.command.is_some();
        let keyboard = config.keyboard && !command;
        let shared = Arc::new(Shared { about, keyboard, is_jailed, command, started, handle, watchers, clients });
        Ok(Self { listener, shared, serving: false })
    }

    /// Those who watch the machine's console.
    pub fn watchers(&self) -> Watchers {
        self.shared.watchers.clone()
    }

    /// Answers, from now on, for the machine that `handle` reaches.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn serve(&mut self, handle: Handle, sandbox: &Sandbox) -> Result<(), Error> {
        let bind = |source| Error::Bind { name: self.shared.about.name.clone(), source };
        *self.shared.handle() = Some(handle);
        if self.serving {
            return Ok(());
        }
        let listener = self.listener.try_clone().map_err(bind)?;
        let (shared, sandbox) = (self.shared.clone(), sandbox.clone());
        let accept = move || {
            if let Err(error) = sandbox.enter_first(Role::Control) {
                return log::error!("cannot restrict the thread for who asks for the machine: {error}");
            }
            for stream in listener.incoming() {
                match stream {
                    Ok(stream) => shared.accept(stream),
                    Err(error) => return log::error!("cannot talk to who asks for the machine: {error}"),
                }
            }
        };
        crate::threads::named("bantam-control".into()).spawn(accept).map_err(bind)?;
        self.serving = true;
        Ok(())
    }
}

impl Shared {
    fn handle(&self) -> std::sync::MutexGuard<'_, Option<Handle>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a client, on a thread of its own.
    fn accept(self: &Arc<Self>, stream: UnixStream) {
        if self.clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
            self.clients.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let shared = self.clone();
        let talk = move || {
            let _ = shared.talk(stream);
            shared.clients.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = crate::threads::named("bantam-client".into()).spawn(talk) {
            self.clients.fetch_sub(1, Ordering::Relaxed);
            log::warn!("cannot start a thread for who asks for the machine: {error}");
        }
    }

    fn talk(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut requests = BufReader::new(stream.try_clone()?);
        loop {
            let mut line = String::new();
            if requests.by_ref().take(REQUEST_MAX).read_line(&mut line)? == 0 {
                return Ok(());
            }
            let request = serde_json::from_slice(line.as_bytes());
            let answer = match &request {
                Ok(request) => self.answer(request).unwrap_or_else(|why| json!({"error": why})),
                Err(error) => json!({"error": format!("cannot understand the request: {error}")}),
            };
            stream.write_all(format!("{answer}\n").as_bytes())?;
            if let (Ok(Request::Console), Value::Null) = (request, &answer["error"]) {
                return self.console(stream, requests);
            }
        }
    }

    fn answer(&self, request: &Request) -> Result<Value, String> {
        let handle = self.handle().clone().ok_or("the machine is being built")?;
        let done = |()| json!({});
        match request {
            Request::About => {
                let (paused, uptime_seconds) = (handle.is_paused(), self.started.elapsed().as_secs());
                let about = About { paused, uptime_seconds, ..self.about.clone() };
                serde_json::to_value(about).map_err(|error| error.to_string())
            }
            Request::Pause => handle.pause().map(done).map_err(|error| chain(&error)),
            Request::Resume => handle.resume().map(done).map_err(|error| chain(&error)),
            Request::Terminate => {
                // One that stands still does not end by itself.
                if handle.is_paused() && (self.keyboard || self.command) {
                    handle.resume().map_err(|error| chain(&error))?;
                }
                if self.keyboard {
                    handle.ctrl_alt_del();
                    return Ok(json!({"asked": true}));
                }
                Ok(json!({"asked": handle.terminate().map_err(|error| chain(&error))?}))
            }
            Request::End => {
                handle.stop();
                Ok(json!({}))
            }
            Request::Metrics => {
                let report = handle.report().map_err(|error| error.to_string())?;
                Ok(json!({"text": report.to_prometheus()}))
            }
            Request::Snapshot(_) | Request::Diff(_) if self.is_jailed => {
                Err("cannot save the machine: it runs in a jail (--jail), in which there is no folder to save it to"
                    .into())
            }
            Request::Snapshot(folder) => {
                handle.snapshot(Destination::Folder(folder.clone())).map_err(|error| chain(&error))?;
                Ok(json!({}))
            }
            Request::Diff(folder) => {
                handle.snapshot(Destination::Diff(folder.clone())).map_err(|error| chain(&error))?;
                Ok(json!({}))
            }
            Request::Console => Ok(json!({})),
        }
    }

    /// What the client types is the guest's input.
    fn console(&self, stream: UnixStream, mut typed: BufReader<UnixStream>) -> io::Result<()> {
        let Some(number) = self.watchers.add(stream) else { return Ok(()) };
        let mut bytes = [0; 1024];
        while let Ok(count @ 1..) = typed.read(&mut bytes) {
            if let Some(handle) = &*self.handle() {
                handle.input(&bytes[..count]);
            }
        }
        self.watchers.remove(number);
        Ok(())
    }
}

/// An error with all its sources.
fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
