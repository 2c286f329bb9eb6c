//! `bantam ps`, `stop`, `pause`, `resume`, `snapshot`, `metrics` and `console`: machines that were started with `--name`.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use bantam::config::{Size, duration};
use bantam::named::{self, About, Client, Name, Request};
use bantam::terminal::{Escapes, Raw, Request as Key};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::stdio::stdin;

const CONSOLE_HELP: &str = "\r\nCtrl-A h    this help\r\nCtrl-A x    leave the machine, which goes on\r\nCtrl-A Ctrl-A    send Ctrl-A to the guest\r\n";

#[derive(Debug, Args)]
pub struct Ps {
    /// Print JSON instead of a table.
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print only names.
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub struct Named {
    /// The machine's name.
    name: Name,
}

#[derive(Debug, Args)]
pub struct Snapshot {
    /// The machine's name.
    name: Name,
    /// The folder of the snapshot; one that is there is replaced when the new one is whole.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Save only the memory that is other than in the snapshot that the machine was restored from, which has to stay where it
    /// is. DIR must not be there.
    #[arg(long)]
    diff: bool,
}

#[derive(Debug, Args)]
pub struct Stop {
    /// The machines' names.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<Name>,
    /// How long the guest has to end by itself.
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = duration::parse)]
    time: Duration,
}

impl Ps {
    /// The machines that run, as text.
    pub fn run(&self) -> Result<String, named::Error> {
        let machines = named::list()?;
        if self.json {
            let json = serde_json::to_string_pretty(&machines).expect("a list of names and numbers");
            return Ok(format!("{json}\n"));
        }
        if self.quiet {
            return Ok(machines.iter().map(|machine| format!("{}\n", machine.name)).collect());
        }
        let width = machines.iter().map(|machine| machine.name.to_string().len()).max().unwrap_or(0).max(4);
        let row = |name: &str, pid: &str, state: &str, uptime: &str, cpus: &str, memory: &str, kernel: &str| {
            format!("{name:width$}  {pid:>7}  {state:7}  {uptime:>8}  {cpus:>4}  {memory:>6}  {kernel}\n")
        };
        let mut table = row("NAME", "PID", "STATE", "UPTIME", "CPUS", "MEMORY", "KERNEL");
        for About { name, pid, paused, uptime_seconds, cpus, memory, kernel } in machines {
            let state = if paused { "paused" } else { "running" };
            let (seconds, minutes, hours) = (uptime_seconds % 60, uptime_seconds / 60 % 60, uptime_seconds / 3600);
            table.push_str(&row(
                &name.to_string(),
                &pid.to_string(),
                state,
                &format!("{hours}:{minutes:02}:{seconds:02}"),
                &cpus.to_string(),
                &Size::bytes(memory).to_string(),
                &kernel.display().to_string(),
            ));
        }
        Ok(table)
    }
}

impl Stop {
    /// Asks each guest to end, and ends the machines of those that have not in time.
    pub fn run(&self) -> Result<(), named::Error> {
        // Each of them, whatever comes of the others.
        self.names.iter().map(|name| self.stop(name)).fold(Ok(()), Result::and)
    }

    fn stop(&self, name: &Name) -> Result<(), named::Error> {
        let mut client = Client::connect(name)?;
        let asked = client.ask(&Request::Terminate)?;
        if asked["asked"] == true && client.wait(Some(self.time))? {
            return Ok(());
        }
        match client.ask(&Request::End) {
            Ok(_) => client.wait(None).map(drop),
            // It has ended meanwhile.
            Err(named::Error::Talk { source, .. }) if source.kind() != io::ErrorKind::TimedOut => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Snapshot {
    /// Saves the machine.
    pub fn run(&self) -> Result<(), named::Error> {
        Client::connect(&self.name)?.snapshot(&self.folder, self.diff)
    }
}

impl Named {
    /// Asks the machine; the text that it answers.
    pub fn ask(&self, request: &Request) -> Result<String, named::Error> {
        let answer = Client::connect(&self.name)?.ask(request)?;
        Ok(answer["text"].as_str().unwrap_or_default().to_owned())
    }

    /// Has this terminal be the machine's console, until the user leaves it, or the machine ends.
    pub fn console(&self) -> Result<(), named::Error> {
        let (mut stream, come) = Client::connect(&self.name)?.console()?;
        let talk = |source| named::Error::Talk { name: self.name.clone(), source };
        let _raw = Raw::enter_whole().map_err(talk)?;
        let mut escapes = Escapes::default();
        let (mut typing, mut bytes) = (true, [0; 4096]);
        show(&come).map_err(talk)?;
        loop {
            let (typed, shown) = {
                let mut fds = vec![PollFd::new(&stream, PollFlags::IN)];
                fds.extend(typing.then(|| PollFd::from_borrowed_fd(stdin(), PollFlags::IN)));
                match poll(&mut fds, None) {
                    Err(rustix::io::Errno::INTR) => continue,
                    polled => polled.map_err(|error| talk(error.into()))?,
                };
                (fds.get(1).is_some_and(|fd| !fd.revents().is_empty()), !fds[0].revents().is_empty())
            };
            if shown {
                match stream.read(&mut bytes) {
                    Ok(0) => return Ok(()),
                    Ok(count) => show(&bytes[..count]).map_err(talk)?,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                    Err(error) => return Err(talk(error)),
                }
            }
            if typed {
                let count = rustix::io::read(stdin(), &mut bytes).map_err(|error| talk(error.into()))?;
                typing = count > 0;
                let (kept, key) = escapes.filter(&mut bytes[..count]);
                match stream.write_all(&bytes[..kept]) {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                    written => written.map_err(talk)?,
                }
                match key {
                    Some(Key::Quit) => return Ok(()),
                    Some(Key::Help) => show(CONSOLE_HELP.as_bytes()).map_err(talk)?,
                    None => {}
                }
            }
        }
    }
}

fn show(bytes: &[u8]) -> io::Result<()> {
    io::stdout().write_all(bytes).and_then(|()| io::stdout().flush())
}
