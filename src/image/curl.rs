//! HTTP and HTTPS by the program `curl`: TLS would be larger than any other part of bantam.
//!
//! `curl` verifies the server's certificate, and heeds the host's proxies (`https_proxy`; none on the way to this machine) and
//! `CURL_CA_BUNDLE`. What it is told it reads from its standard input, as others can see a program's arguments.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use super::archive::invalid;

/// The most bytes of a line before the body, and the most such lines.
const LINE_MAX: u64 = 16 << 10;
const LINES_MAX: usize = 256;
const AGENT: &str = concat!("bantam/", env!("CARGO_PKG_VERSION"));

/// What a server answers.
pub struct Answer {
    pub status: u16,
    /// What it wants to have authorization by.
    pub challenge: String,
    pub body: Body,
}

/// Asks for `uri`, and follows redirections: by TLS, or to a server on this machine also without.
///
/// # Errors
/// Of kind [`io::ErrorKind::Unsupported`] when there is no such program; else when there is no answer.
pub fn get(uri: &str, headers: &[(&str, String)], is_local: bool) -> io::Result<Answer> {
    let mut command = Command::new("curl");
    // First, and so without its user's own settings.
    command.args(["--disable", "--config", "-", "--silent", "--show-error", "--include", "--suppress-connect-headers"]);
    let protocols = if is_local { "=http,https" } else { "=https" };
    command.args(["--location", "--max-redirs", "10", "--proto", protocols, "--proto-redir", protocols]);
    command.args(["--connect-timeout", "30", "--speed-time", "60", "--user-agent", AGENT]);
    if is_local {
        command.args(["--noproxy", "*"]);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::ErrorKind::Unsupported.into(),
        _ => error,
    })?;
    let (input, output) = (child.stdin.take(), child.stdout.take());
    let output = output.ok_or_else(|| io::Error::other("it has no output"))?;
    let mut body = Body { child, output: BufReader::new(output), at_end: false };
    let mut settings = format!("url = {}\n", quoted(uri)?);
    for (name, value) in headers {
        settings += &format!("header = {}\n", quoted(&format!("{name}: {value}"))?);
    }
    if let Some(mut input) = input {
        input.write_all(settings.as_bytes())?;
    }
    loop {
        let (status, challenge, is_redirected) = body.head()?;
        // What it follows has no body here.
        if status >= 200 && !((300..400).contains(&status) && is_redirected) {
            return Ok(Answer { status, challenge, body });
        }
    }
}

/// `text` as a value in curl's settings.
fn quoted(text: &str) -> io::Result<String> {
    if text.contains(char::is_control) {
        return Err(invalid(format!("{text:?} cannot be asked for")));
    }
    Ok(format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")))
}

/// What it gets, as it comes. It is ended when this is dropped.
pub struct Body {
    child: Child,
    output: BufReader<ChildStdout>,
    at_end: bool,
}

impl Body {
    /// The status of an answer, what it wants to have authorization by, and whether it leads elsewhere.
    fn head(&mut self) -> io::Result<(u16, String, bool)> {
        let (mut status, mut challenge, mut is_redirected) = (None, String::new(), false);
        for _ in 0..LINES_MAX {
            let mut line = vec![];
            self.output.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)?;
            if line.is_empty() {
                self.end()?;
                return Err(invalid("curl printed no answer"));
            }
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end();
            match (status, line.split_once(':')) {
                (None, _) => status = line.split(' ').nth(1).and_then(|status| status.parse().ok()),
                (Some(status), _) if line.is_empty() => return Ok((status, challenge, is_redirected)),
                (_, Some((name, value))) if name.eq_ignore_ascii_case("www-authenticate") => {
                    challenge = value.trim().to_owned();
                }
                (_, Some((name, _))) => is_redirected |= name.eq_ignore_ascii_case("location"),
                _ => {}
            }
        }
        Err(invalid("the answer has too many headers"))
    }

    /// It has no more to say: whether that was all.
    fn end(&mut self) -> io::Result<()> {
        self.at_end = true;
        let mut said = String::new();
        if let Some(errors) = self.child.stderr.take() {
            errors.take(LINE_MAX).read_to_string(&mut said)?;
        }
        match self.child.wait()?.success() {
            true => Ok(()),
            false => Err(io::Error::other(said.trim().to_owned())),
        }
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.output.read(buffer)?;
        if read == 0 && !buffer.is_empty() && !self.at_end {
            self.end()?;
        }
        Ok(read)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_one_line_each() {
        assert_eq!(quoted(r#"a "b" \"#).unwrap(), r#""a \"b\" \\""#);
        assert!(quoted("a\nurl = b").is_err());
    }
}
