//! The `bantam` command: flags in, an exit status out. Exit statuses exist only here.

#![cfg_attr(all(target_env = "gnu", not(test)), no_main)]

mod cli;
mod process;

use std::error::Error;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Instant;

use bantam::boot::kernel;
use bantam::config::Config;
use bantam::control::Served;
use bantam::devices::console;
use bantam::machine::{Builder, Machine, Snapshot};
use bantam::named::{Request, Server};
use bantam::outcome::{CrashKind, Outcome};
use bantam::signal::{self, SignalFd};
use bantam::{check, memory, terminal};
use clap::Parser;
use clap::error::ErrorKind;
use cli::attempts::Attempts;
use cli::jail::{self, Inside, Side};
use cli::message::{chain, say};
use cli::output_file::OutputFile;
use cli::restore::Restore;
use cli::sandbox::Process;
use cli::test::{Test, Verdict};
use cli::told::{named_console, telling};
use cli::warm::Starts;
use cli::{Cli, Command, ending};
use process::ExitCode;
use rustix::stdio::{stderr, stdout};
use rustix::termios::isatty;

/// The guest kernel panicked.
const PANICKED: u8 = 121;
/// The guest crashed.
const CRASHED: u8 = 122;
/// The guest did not boot in time.
const BOOT_TIMED_OUT: u8 = 123;
/// The guest ran for longer than it may.
const TIMED_OUT: u8 = 124;
/// bantam could not start, or failed.
const FAILED: u8 = 125;
/// With the number of the signal that ended the machine, or its command, which is below it.
const SIGNALED: u8 = 128;

#[cfg(any(not(target_env = "gnu"), test))]
fn main() -> std::process::ExitCode {
    start().into()
}

/// Does what the arguments say.
fn start() -> ExitCode {
    let started = Instant::now();
    std::panic::set_hook(Box::new(|panic| {
        terminal::restore();
        say(&format!("internal error, please report it: {panic}"));
        std::process::exit(FAILED.into());
    }));
    signal::set_up();
    memory::use_one_arena();
    if cli::api::is_firecracker(std::env::args_os().next()) {
        return match cli::api::parse() {
            Ok(flags) => api(&flags, started).unwrap_or_else(|error| failed(&*error)),
            Err(error) => usage(&error),
        };
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.command {
        Command::Run(run) => self::run(*run, started),
        Command::Restore(restore) => self::restore(&restore, started),
        Command::Api(flags) => api(&flags, started),
        Command::Check(check) => self::check(&check),
        Command::Kernel(kernel) => print_told(|told| kernel.run(told)),
        Command::Warm(warm) => print_told(|told| warm.run(told)),
        Command::Image(image) => print_told(|told| image.run(told)),
        Command::Ps(ps) => ps.run().map_err(Into::into).and_then(|text| print(text.as_bytes())),
        Command::Stop(stop) => stop.run().map_err(Into::into).map(|()| ExitCode::SUCCESS),
        Command::Pause(machine) => ask(&machine, &Request::Pause),
        Command::Resume(machine) => ask(&machine, &Request::Resume),
        Command::Snapshot(snapshot) => snapshot.run().map_err(Into::into).map(|()| ExitCode::SUCCESS),
        Command::Metrics(machine) => ask(&machine, &Request::Metrics),
        Command::Console(machine) => machine.console().map_err(Into::into).map(|()| ExitCode::SUCCESS),
        Command::Merge(merge) => merge.run().map_err(Into::into).map(|()| ExitCode::SUCCESS),
        Command::Test(test) => self::test(&test),
        Command::Completions { shell } => print(&cli::completions(shell)),
        Command::Man { command } => cli::man(&command).map_err(Into::into).and_then(|page| print(&page)),
    };
    result.unwrap_or_else(|error| failed(&*error))
}

/// Says why nothing came of it.
fn failed(error: &(dyn Error + 'static)) -> ExitCode {
    say(&chain(error));
    if let Some(advice) = advice(error) {
        say(&advice);
    }
    ExitCode::from(FAILED)
}

/// Runs a machine that clients of the API describe.
fn api(flags: &cli::api::Flags, started: Instant) -> Result<ExitCode, Box<dyn Error>> {
    flags.check()?;
    if flags.snapshot_version {
        return print(format!("v{}.0.0\n", bantam::snapshot::FORMAT).as_bytes());
    }
    if let Some(path) = &flags.describe_snapshot {
        return print(format!("v{}.0.0\n", Snapshot::version(path)?).as_bytes());
    }
    // First: clients wait for it.
    let mut server = flags.server()?;
    let mut program = cli::api::Machines::new(flags, started)?;
    let mut unserved = flags.api();
    let api = server.as_mut().map_or(&mut unserved, bantam::control::Server::api);
    program.count(api.counts());
    api.set_startup(flags.startup(started));
    if let Some(metrics) = flags.metrics() {
        api.set_metrics(metrics)?;
    }
    let settings = flags.settings()?;
    if let Some((path, settings)) = settings {
        let handle = program.start_from(&path, &settings)?;
        api.started_with(settings, handle)?;
    } else if let Some(server) = &mut server {
        match server.serve(Some(&mut program))? {
            Served::Signaled(number) => return Ok(signaled(number)),
            Served::Started | Served::Stopped => {}
        }
    }
    let Some(mut machine) = program.machine.take() else { return Ok(ExitCode::SUCCESS) };
    program.process.enter(&machine)?;
    let serving = server.map(|server| cli::api::Serving::start(server, machine.sandbox())).transpose()?;
    let ended = machine.run();
    drop(serving);
    // The signals do what they usually do.
    drop(program);
    if flags.boot_timer
        && let Some(milliseconds) = machine.report().durations.user_space
    {
        log::info!("Guest-boot-time = {} us", milliseconds.as_micros());
    }
    let outcome = ended?;
    drop(machine);
    tell(&outcome, false);
    Ok(status(&outcome))
}

/// Asks a machine by its name.
fn ask(machine: &cli::named::Named, request: &Request) -> Result<ExitCode, Box<dyn Error>> {
    print(machine.ask(request)?.as_bytes())
}

/// Runs a machine to its end.
fn run(mut run: cli::Run, started: Instant) -> Result<ExitCode, Box<dyn Error>> {
    if run.supervised.is_some_and(|parent| !signal::end_with_parent(parent)) {
        return Err("cannot run for a process that has ended".into());
    }
    let document = run.document()?;
    let run = run;
    Process::new(cli::sandbox::mode(run.sandbox())).close_others(&document.config);
    if run.github {
        cli::github::guard_words();
    }
    let mut unknown = Ok(());
    let (kernel, mut in_use) = match cli::kernel::find(run.kernel.as_deref()) {
        // What is printed need not be there, and a report tells that it is not.
        Err(error @ cli::kernel::Error::Unknown { .. }) => {
            unknown = Err(error.into());
            (run.kernel.clone().unwrap_or_default(), None)
        }
        found => found?,
    };
    let mut config = run.config(document, kernel)?;
    if run.print_config {
        config.validate()?;
        return print(run.print(&config)?.as_bytes());
    }
    let outputs = [
        ("report", &run.report),
        ("JUnit file", &run.junit),
        ("log", &run.log_file),
        ("events", &run.events),
        ("metrics", &run.metrics),
    ];
    cli::outputs::check(&config, &outputs.map(|(what, path)| (what, path.as_deref())))?;
    let mut attempts = Attempts::new(&run, &config)?;
    if run.retries() > 0 {
        prepare_retries(&config)?;
    }
    let is_on_stdout = config.serial == console::Spec::Stdio;
    let has_command = config.command.is_some();
    let has_root = config.initrd.is_some() || !config.disks.is_empty() || config.rootfs.is_some();
    let mut image = None;
    let mut process = process(&run, &attempts);
    let opened = unknown.and_then(|()| cli::rootfs::open(&mut config).map_err(Box::from));
    let mut opened: Result<(), Box<dyn Error>> = opened.map(|opened| image = opened);
    let has_command = has_command || image.is_some();
    let bind = if run.jail.is_some() { Server::bind_jailed } else { Server::bind };
    let mut named = run.name.as_ref().map(|name| bind(name, &config, started)).transpose()?;
    if let Some(spec) = run.jail.as_ref().filter(|_| opened.is_ok()) {
        let retry = "files are opened once; have `bantam test` or the caller try again";
        let warm = "a snapshot is opened or written when the machine runs";
        let others = [
            (run.retries() > 0, "other attempts (--retry)", retry),
            (run.warm.is_some(), "a warm start (--warm)", warm),
        ];
        jail::check(&others)?;
        match jail::start(spec, &config)? {
            Side::Launcher(launcher) => return launcher.finish(&config, |file, text| attempts.write(file, text)),
            Side::Inside(inside) => {
                attempts.write_by(&inside.files());
                process.jail = Some(inside);
            }
        }
    }
    let mut warm = None;
    let may_be_again = run.retries() > 0 || run.warm.is_some();
    let (ended, machine) = attempts.run(has_command, started, &mut warm, |begin, wanted, warm| {
        let config = if may_be_again { config.clone() } else { std::mem::take(&mut config) };
        let built = std::mem::replace(&mut opened, Ok(()));
        let built = built.and_then(|()| {
            if let (Some(key), None) = (&run.warm, &warm) {
                *warm = Some(Starts::new(key, &config)?);
            }
            build(&run, config, begin, wanted, &mut named, warm, &process)
        });
        // Kernel and modules are in the guest's memory, unless they are needed again.
        in_use = in_use.take().filter(|_| may_be_again);
        built
    });
    warm.iter_mut().for_each(Starts::finish);
    let unwritten = attempts.tell().err();
    let outcome = match (ended, &machine) {
        (Ok(outcome), _) => outcome,
        (Err(error), machine) => {
            machine.iter().filter(|_| is_of_the_guest(&*error)).for_each(say_console);
            unwritten.iter().for_each(|error| say(&chain(error)));
            return Err(error);
        }
    };
    // A guest that goes away says nothing about the command.
    if let Some(machine) = machine.as_ref().filter(|_| has_command && ending::is_before_the_end(&outcome)) {
        say(attempts.last().cause());
        say_console(machine);
        if !machine.has_modules() && machine.report().durations.command.is_none() {
            say(
                "no modules were found for its kernel: if that has not built in virtio-mmio, virtio-blk, virtio-vsock, \
                 overlayfs and the root's file system, --modules DIR tells where they are",
            );
        }
        return Ok(ExitCode::from(FAILED));
    }
    // The terminal is the user's again before anything is said.
    drop(machine);
    tell(&outcome, is_on_stdout);
    if let (Outcome::Panicked(panic), false) = (&outcome, has_root)
        && panic.message.contains("Unable to mount root fs")
    {
        say("the machine has no root file system, and its kernel brings none: name a disk image \
             (bantam run --kernel KERNEL ROOTFS), or an --initrd");
    }
    if attempts.last().ran_out_of_memory() {
        say(attempts.last().cause());
    }
    if let Some(error) = unwritten {
        return Err(error.into());
    }
    Ok(status(&outcome))
}

/// The sandbox of a run.
fn process(run: &cli::Run, attempts: &Attempts) -> Process {
    let mut process = Process::new(cli::sandbox::mode(run.sandbox()));
    process.asked = run.name.is_some();
    // One that starts warm is saved when it is ready, or booted when that does not work.
    process.builds_again = run.retries() > 0 || run.warm.is_some();
    process.later = attempts.opened_later();
    process
}

/// Has a saved machine go on, to its end.
fn restore(restore: &Restore, started: Instant) -> Result<ExitCode, Box<dyn Error>> {
    Process::new(cli::sandbox::mode(restore.sandbox())).close_others(&Config::new());
    let snapshot = restore.snapshot()?;
    let Restore { report, log_file, events, metrics, .. } = restore;
    let outputs = [("report", report), ("log", log_file), ("events", events), ("metrics", metrics)];
    cli::outputs::check(&snapshot.config, &outputs.map(|(what, path)| (what, path.as_deref())))?;
    let mut report = restore.report.as_deref().map(|path| OutputFile::new("report", path)).transpose()?;
    let is_on_stdout = snapshot.config.serial == console::Spec::Stdio;
    let bind = if restore.jail.is_some() { Server::bind_jailed } else { Server::bind };
    let mut named = restore.name.as_ref().map(|name| bind(name, &snapshot.config, started)).transpose()?;
    let mut process = Process::new(cli::sandbox::mode(restore.sandbox()));
    process.asked = restore.name.is_some();
    process.later = report.iter().filter_map(OutputFile::opened_later).collect();
    if let Some(spec) = &restore.jail {
        jail::check(&restore.unfit_for_jail())?;
        match jail::start(spec, &snapshot.config)? {
            Side::Launcher(launcher) => {
                let write = |_, content: &[u8]| report.as_ref().map_or(Ok(()), |file| file.write(content));
                return launcher.finish(&snapshot.config, write);
            }
            Side::Inside(inside) => {
                report.iter_mut().for_each(|file| file.write_by(inside.files(), 0));
                process.jail = Some(inside);
            }
        }
    }
    let log = cli::log::start(restore.verbose, restore.log_file.as_deref())?;
    let signals = signals(false, process.jail.as_ref())?;
    cli::descriptors::allow(&snapshot.config);
    let threads = process.threads(&snapshot.config)?;
    let builder = named_console(Builder::restore(snapshot), &named).sandbox(threads);
    let builder = builder.started(started).signals(signals).upkeep(process::give_back);
    let builder = process.jail.iter().fold(builder, |builder, jail| builder.pid(jail.launcher).detach_folders(true));
    let mut machine = telling(builder, events.as_deref(), metrics.as_deref())?.build()?;
    log.create()?;
    process.enter(&machine)?;
    if let Some(named) = &mut named {
        named.serve(machine.handle(), machine.sandbox())?;
    }
    let outcome = machine.run()?;
    let told = machine.report();
    drop(machine);
    tell(&outcome, is_on_stdout);
    if let Some(file) = report {
        file.write(format!("{:#}\n", serde_json::to_value(told)?).as_bytes())?;
    }
    Ok(status(&outcome))
}

/// The signals that end a machine, or tell of its command's terminal.
fn signals(terminal: bool, jail: Option<&Inside>) -> Result<SignalFd, String> {
    let mut signals = signal::ENDING.to_vec();
    // A terminal that a shell had while this process was stopped, or that changes its size.
    signals.push(libc::SIGCONT);
    signals.extend(terminal.then_some(libc::SIGWINCH));
    let taken = match jail {
        Some(jail) => jail.signals().and_then(|pipe| SignalFd::passed_on(&signals, pipe)),
        None => SignalFd::new(&signals),
    };
    taken.map_err(|error| format!("cannot wait for signals by a signalfd: {error}"))
}

/// Has every attempt find the same: what the first one reads or takes is gone.
fn prepare_retries(config: &Config) -> Result<(), Box<dyn Error>> {
    if let Some(fd) = config.nets.iter().find_map(|net| net.fd) {
        return Err(
            format!("cannot try again (--retry) with --net fd={fd}: the first attempt closes the descriptor").into()
        );
    }
    let empty = std::fs::File::open("/dev/null").map_err(|error| format!("cannot open /dev/null: {error}"))?;
    rustix::stdio::dup2_stdin(empty).map_err(|error| format!("cannot leave standard input: {error}"))?;
    Ok(())
}

fn is_of_the_guest(error: &(dyn Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(bantam::machine::Error::Guest(_)))
}

/// Shows the last lines of the guest's console, if there are any.
fn say_console(machine: &Machine) {
    let tail = machine.console_tail();
    if !tail.is_empty() {
        say(&format!("the last lines of the guest's console:\n{}", indent(&tail)));
    }
}

fn indent(lines: &[String]) -> String {
    lines.iter().map(|line| format!("  {line}\n")).collect()
}

/// Builds the machine that the flags ask for.
fn build(
    run: &cli::Run,
    config: Config,
    started: Instant,
    keep: bool,
    named: &mut Option<Server>,
    warm: &mut Option<Starts>,
    process: &Process,
) -> Result<Machine, Box<dyn Error>> {
    let log = cli::log::start(run.verbose, run.log_file.as_deref())?;
    let what = format!(
        "{} (vCPUs: {}, memory: {})",
        config.kernel.as_deref().unwrap_or(Path::new("")).display(),
        config.cpus,
        config.memory
    );
    cli::descriptors::allow(&config);
    let terminal = config.command.as_ref().is_some_and(|command| command.tty);
    let threads = process.threads(&config)?;
    let build = |builder: Builder| {
        let signals = signals(terminal, process.jail.as_ref())?;
        let builder = builder.started(started).signals(signals).sandbox(threads.clone());
        let builder = builder.kernel_cache(kernel::Cache::User);
        let mut builder = builder.upkeep(process::give_back);
        if let Some(jail) = &process.jail {
            builder = builder.pid(jail.launcher).detach_folders(true);
        }
        if keep {
            builder = builder.keep_output(ending::KEPT);
        }
        let builder = telling(builder, run.events.as_deref(), run.metrics.as_deref())?;
        Ok::<_, Box<dyn Error>>(named_console(builder, named).build()?)
    };
    let machine = match warm {
        Some(warm) => warm.build(config, build)?,
        None => build(Builder::new(config))?,
    };
    log.create()?;
    process.enter(&machine)?;
    if let Some(named) = named {
        named.serve(machine.handle(), machine.sandbox())?;
    }
    log::info!("running {what}");
    if !check::hardware_virtualization() {
        log::warn!(
            "this machine's CPU has no VT-x or SVM: KVM only emulates a guest's kernel, and a stock one may show nothing \
             for minutes (`bantam check` tells what to do)"
        );
    }
    Ok(machine)
}

/// Runs tests.
fn test(test: &Test) -> Result<ExitCode, Box<dyn Error>> {
    let verdict = test.run().map_err(Box::new)?;
    Ok(match verdict {
        Verdict::Passed => ExitCode::SUCCESS,
        Verdict::Failed => ExitCode::FAILURE,
        Verdict::Ended(number) => signaled(number),
    })
}

/// Looks at the host, and at a kernel if there is one to look at.
fn check(check: &cli::Check) -> Result<ExitCode, Box<dyn Error>> {
    let host = check::host();
    let kernel = check.kernel.as_deref().map(|asked| cli::kernel::find(Some(asked))).transpose()?;
    let kernel = kernel.map(|(path, _in_use)| check::kernel(&path));
    let ready = host.is_ready() && kernel.as_ref().is_none_or(check::Table::is_ready);
    let text = if check.json {
        let json = serde_json::json!({"ready": ready, "host": host, "kernel": kernel});
        format!("{json:#}\n")
    } else {
        let kernel = kernel.map(|table| format!("Kernel:\n{table}")).unwrap_or_default();
        format!("Host:\n{host}{kernel}")
    };
    print(text.as_bytes())?;
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn status(outcome: &Outcome) -> ExitCode {
    match outcome {
        Outcome::PoweredOff | Outcome::Rebooted | Outcome::Halted | Outcome::Stopped => ExitCode::SUCCESS,
        Outcome::Exited(status) => ExitCode::from(*status),
        Outcome::Panicked(_) => ExitCode::from(PANICKED),
        Outcome::Crashed(_) => ExitCode::from(CRASHED),
        Outcome::BootTimedOut { .. } => ExitCode::from(BOOT_TIMED_OUT),
        Outcome::TimedOut { .. } => ExitCode::from(TIMED_OUT),
        Outcome::Signaled(number) | Outcome::Killed(number) => signaled(*number),
    }
}

fn signaled(number: i32) -> ExitCode {
    ExitCode::from(u8::try_from(number).map_or(FAILED, |number| SIGNALED | number))
}

/// Whether what is written to the one is seen where what is written to the other is, at once.
fn are_one_terminal(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let device = |fd| isatty(fd).then(|| rustix::fs::fstat(fd)).and_then(Result::ok).map(|stat| stat.st_rdev);
    device(one).is_some() && device(one) == device(other)
}

/// Says how the machine ended, if it was not by the guest's own will. Its console may have been on standard output.
fn tell(outcome: &Outcome, console_is_on_stdout: bool) {
    let console_was_seen = || console_is_on_stdout && are_one_terminal(stdout(), stderr());
    match outcome {
        Outcome::Exited(_) | Outcome::Killed(_) => log::info!("{outcome}"),
        Outcome::PoweredOff | Outcome::Rebooted | Outcome::Halted | Outcome::Stopped => log::info!("{outcome}"),
        Outcome::Panicked(panic) if !console_was_seen() => {
            say(&format!("{outcome}; the last lines of its console:\n{}", indent(&panic.console_tail)));
        }
        Outcome::Crashed(crash) => {
            say(&outcome.to_string());
            if crash.kind == CrashKind::EmulationFailure && !check::hardware_virtualization() {
                say("this machine's CPU has no VT-x or SVM, so KVM only emulates a guest's kernel here, and not all \
                     of it: use a machine with nested virtualisation (`bantam check` tells)");
            }
        }
        _ => say(&outcome.to_string()),
    }
}

/// What the user can do about an error, if that is known.
fn advice(error: &(dyn Error + 'static)) -> Option<String> {
    use bantam::{kvm, machine};
    match error.downcast_ref::<machine::Error>()? {
        machine::Error::Kvm(kvm::Error::Open(_)) => check::kvm_advice(),
        _ => None,
    }
}

/// A mistake in the flags, or a wish for help.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Clap knows whether the terminal has colours. A reader that goes away has seen enough.
        return match error.print() {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitCode::from(FAILED),
            _ => ExitCode::SUCCESS,
        };
    }
    let text = error.render().to_string();
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        say("what to do is missing: expected one of the commands below");
        let _ = writeln!(io::stderr(), "\n{}", text.trim_end());
        return ExitCode::from(FAILED);
    }
    say(text.strip_prefix("error: ").unwrap_or(&text).trim_end());
    ExitCode::from(FAILED)
}

/// Prints what something tells of, also when it then fails.
fn print_told<E: Error + 'static>(tell: impl FnOnce(&mut String) -> Result<(), E>) -> Result<ExitCode, Box<dyn Error>> {
    let mut told = String::new();
    let done = tell(&mut told);
    let printed = print(told.as_bytes());
    done?;
    printed
}

/// Writes to standard output. A reader that goes away has seen enough.
fn print(text: &[u8]) -> Result<ExitCode, Box<dyn Error>> {
    match io::stdout().write_all(text).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}").into())
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}
