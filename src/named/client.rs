//! The other end: what asks a machine by its name.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{self, Path};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{About, Error, Name, Request, folder, make_folder};
use crate::socket;

/// How long a machine may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to do what it is asked for, but for saving itself.
const ANSWER: Duration = Duration::from_secs(30);

/// A connection to a machine.
#[derive(Debug)]
pub struct Client {
    name: Name,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the machine of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn connect(name: &Name) -> Result<Self, Error> {
        match UnixStream::connect(folder().join(name.to_string())) {
            Ok(stream) => {
                let client = Self { name: name.clone(), stream: BufReader::new(stream) };
                client.limit(Some(ANSWER))?;
                Ok(client)
            }
            Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) => {
                Err(Error::NoMachine(name.clone()))
            }
            Err(source) => Err(Error::Talk { name: name.clone(), source }),
        }
    }

    fn limit(&self, limit: Option<Duration>) -> Result<(), Error> {
        let stream = self.stream.get_ref();
        let set = stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit));
        set.map_err(|error| self.talk(error))
    }

    fn talk(&self, source: io::Error) -> Error {
        let source = match source.kind() {
            io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "it does not answer"),
            _ => source,
        };
        Error::Talk { name: self.name.clone(), source }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// When it could not be done, or the machine has ended.
    pub fn ask(&mut self, request: &Request) -> Result<Value, Error> {
        let asked = format!("{}\n", serde_json::to_string(request).expect("a request is words"));
        self.stream.get_ref().write_all(asked.as_bytes()).map_err(|error| self.talk(error))?;
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(|error| self.talk(error))?;
        let answer: Value =
            serde_json::from_slice(line.as_bytes()).map_err(|_| self.talk(io::ErrorKind::UnexpectedEof.into()))?;
        match answer["error"].as_str() {
            Some(why) => Err(Error::Refused(why.to_owned())),
            None => Ok(answer),
        }
    }

    /// Saves the machine to `folder`, and waits until all of it is there; of a diff, all that is other than in the snapshot that it
    /// was restored from.
    ///
    /// # Errors
    /// When it could not be saved, or has ended.
    pub fn snapshot(&mut self, folder: &Path, is_diff: bool) -> Result<(), Error> {
        let folder = path::absolute(folder).map_err(|error| self.talk(error))?;
        if folder.to_str().is_none() {
            return Err(Error::NoText { name: self.name.clone(), folder });
        }
        // One that hangs is found out before there is no limit.
        self.ask(&Request::About)?;
        self.limit(None)?;
        let request = if is_diff { Request::Diff(folder) } else { Request::Snapshot(folder) };
        self.ask(&request).map(drop)
    }

    /// Waits until the machine has ended, for at most this time; whether it has.
    ///
    /// # Errors
    /// When the host cannot wait.
    pub fn wait(&mut self, limit: Option<Duration>) -> Result<bool, Error> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                // For what is asked next.
                return self.limit(Some(ANSWER)).map(|()| false);
            }
            self.stream.get_ref().set_read_timeout(left).map_err(|error| self.talk(error))?;
            match self.stream.read(&mut [0; 64]) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(true),
                Err(error)
                    if [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut, io::ErrorKind::Interrupted]
                        .contains(&error.kind()) => {}
                Err(error) => return Err(self.talk(error)),
            }
        }
    }

    /// The console, and what of it has come already.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn console(mut self) -> Result<(UnixStream, Vec<u8>), Error> {
        self.ask(&Request::Console)?;
        self.limit(None)?;
        let come = self.stream.buffer().to_vec();
        Ok((self.stream.into_inner(), come))
    }
}

/// The machines that run, by name. The sockets of those that were killed are removed.
///
/// # Errors
/// When the folder cannot be read.
pub fn list() -> Result<Vec<About>, Error> {
    if !folder().exists() {
        return Ok(vec![]);
    }
    let folder = make_folder()?;
    let entries = fs::read_dir(&folder).map_err(|error| Error::Folder(folder.clone(), error))?;
    let mut machines = vec![];
    for entry in entries.filter_map(Result::ok) {
        let Some(name) = entry.file_name().to_str().and_then(|name| name.parse::<Name>().ok()) else { continue };
        match Client::connect(&name) {
            Ok(mut client) => {
                let _ = client.stream.get_ref().set_read_timeout(Some(PATIENCE));
                // One that is being built, or ends just now, is not told of.
                let about = client.ask(&Request::About).ok().and_then(|about| serde_json::from_value(about).ok());
                machines.extend(about);
            }
            // Between its making and its first client a socket refuses them, too.
            Err(Error::NoMachine(_)) if socket::is_stale(&entry.path()) => drop(fs::remove_file(entry.path())),
            Err(error) => log::debug!("{error}"),
        }
    }
    machines.sort_unstable_by(|one: &About, other| one.name.cmp(&other.name));
    Ok(machines)
}
