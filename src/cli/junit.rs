//! JUnit XML: what test runners write, and continuous integration reads.
//!
//! The elements are those of Maven Surefire's schema, with `flakyFailure` and `rerunFailure` for attempts that failed
//! before the last.

use std::fmt::{Display, Formatter, Result, Write};
use std::time::Duration;

use bantam::command::Tail;

use super::ending::{Ending, Failure, plain};

/// One test case.
pub struct Case {
    /// What it belongs to.
    pub class: String,
    pub name: String,
    /// How its attempts ended, in order; none if it was not run.
    pub attempts: Vec<Ending>,
    /// The end of standard output and standard error, of the last attempt.
    pub output: [Tail; 2],
}

impl Case {
    /// Whether it failed; the reason is that of the last attempt.
    pub fn failure(&self) -> Option<Failure> {
        self.attempts.last().and_then(|ending| ending.failure)
    }

    /// How long all attempts took.
    pub fn time(&self) -> Duration {
        self.attempts.iter().map(|ending| ending.time).sum()
    }
}

/// The document with these cases.
pub fn document(suite: &str, cases: &[Case], time: Duration) -> String {
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    write(&mut text, suite, cases, time).expect("writing to memory does not fail");
    text
}

fn write(out: &mut String, suite: &str, cases: &[Case], time: Duration) -> Result {
    let count = |is: fn(&Case) -> bool| cases.iter().filter(|case| is(case)).count();
    let counts = format!(
        "tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{:.3}\"",
        cases.len(),
        count(|case| case.failure().is_some_and(Failure::is_of_the_guest)),
        count(|case| case.failure().is_some_and(|failure| !failure.is_of_the_guest())),
        count(|case| case.attempts.is_empty()),
        time.as_secs_f64()
    );
    writeln!(out, "<testsuites name=\"bantam\" {counts}>\n<testsuite name=\"{}\" {counts}>", Text(suite))?;
    for case in cases {
        let seconds = case.time().as_secs_f64();
        writeln!(
            out,
            "<testcase classname=\"{}\" name=\"{}\" time=\"{seconds:.3}\">",
            Text(&case.class),
            Text(&case.name)
        )?;
        write_attempts(out, case)?;
        for (element, tail) in ["system-out", "system-err"].into_iter().zip(&case.output) {
            write_output(out, element, tail)?;
        }
        writeln!(out, "</testcase>")?;
    }
    writeln!(out, "</testsuite>\n</testsuites>")
}

fn write_attempts(out: &mut String, case: &Case) -> Result {
    let Some((last, earlier)) = case.attempts.split_last() else {
        return writeln!(out, "<skipped message=\"it was not run\"/>");
    };
    let earlier_element = if last.failure.is_some() { "rerunFailure" } else { "flakyFailure" };
    if let Some(failure) = last.failure {
        let element = if failure.is_of_the_guest() { "failure" } else { "error" };
        writeln!(out, "<{element} {}>{}</{element}>", Attributes(failure, last), Text(&last.text()))?;
    }
    for ending in earlier {
        let failure = ending.failure.unwrap_or(Failure::Error);
        writeln!(
            out,
            "<{earlier_element} {}><stackTrace>{}</stackTrace></{earlier_element}>",
            Attributes(failure, ending),
            Text(&ending.text())
        )?;
    }
    Ok(())
}

fn write_output(out: &mut String, element: &str, tail: &Tail) -> Result {
    let bytes = tail.bytes();
    if bytes.is_empty() {
        return Ok(());
    }
    write!(out, "<{element}>")?;
    if tail.dropped() > 0 {
        writeln!(out, "[the first {} bytes are left out]", tail.dropped())?;
    }
    writeln!(out, "{}</{element}>", Text(&plain(&String::from_utf8_lossy(&bytes))))
}

struct Attributes<'a>(Failure, &'a Ending);

impl Display for Attributes<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "type=\"{}\" message=\"{}\"", self.0.name(), Text(&self.1.cause))
    }
}

/// Text as it may stand in an element, or in quotes in an attribute: XML 1.0 section 2.2 has no other characters.
struct Text<'a>(&'a str);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                // `]]>` may not be text.
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\t' | '\n' => f.write_char(c)?,
                '\r' => f.write_str("&#13;")?,
                c if c < ' ' || matches!(c, '\u{fffe}' | '\u{ffff}') => f.write_char(char::REPLACEMENT_CHARACTER)?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tail(bytes: &[u8]) -> Tail {
        let mut tail = Tail::new(16);
        tail.push(bytes);
        tail
    }

    fn ending(failure: Option<Failure>, cause: &str) -> Ending {
        Ending { failure, cause: cause.into(), time: Duration::from_millis(1500), ..Ending::default() }
    }

    fn case(name: &str, attempts: Vec<Ending>) -> Case {
        Case { class: "k/r".into(), name: name.into(), attempts, output: [tail(b""), tail(b"")] }
    }

    #[test]
    fn a_document_of_every_kind() {
        let cases = [
            Case {
                output: [tail(b"a<b\xff\x00\x1b[31m]]>"), tail(b"0123456789abcdefg")],
                ..case("ok", vec![ending(None, "")])
            },
            case("bad", vec![ending(Some(Failure::Panic), "no \"init\" & <x>\nnext")]),
            case("lost", vec![ending(Some(Failure::Error), "no kernel")]),
            case("flaky", vec![ending(Some(Failure::Timeout), "slow"), ending(None, "")]),
            case("not run", vec![]),
        ];
        let text = document("s", &cases, Duration::from_secs(7));
        let counts = "tests=\"5\" failures=\"1\" errors=\"1\" skipped=\"1\" time=\"7.000\"";
        for expected in [
            format!("<testsuite name=\"s\" {counts}>").as_str(),
            "<testcase classname=\"k/r\" name=\"ok\" time=\"1.500\">\n<system-out>a&lt;b\u{fffd}\u{fffd}]]&gt;</system-out>\n\
             <system-err>[the first 1 bytes are left out]\n123456789abcdefg</system-err>\n</testcase>\n",
            "<failure type=\"panic\" message=\"no &quot;init&quot; &amp; &lt;x&gt;\nnext\">",
            "<error type=\"error\" message=\"no kernel\">no kernel\n</error>",
            "<testcase classname=\"k/r\" name=\"flaky\" time=\"3.000\">\n\
             <flakyFailure type=\"timeout\" message=\"slow\"><stackTrace>slow\n</stackTrace></flakyFailure>\n</testcase>",
            "<skipped message=\"it was not run\"/>",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_characters_that_xml_has(text: String) {
            let escaped = Text(&text).to_string();
            prop_assert!(!escaped.contains(['<', '>', '"', '\r']));
            let is_allowed = |c| matches!(c, '\t' | '\n' | ' '..='\u{fffd}' | '\u{10000}'..);
            prop_assert!(escaped.chars().all(is_allowed));
            prop_assert_eq!(escaped.matches('&').count(), escaped.matches(';').count() - text.matches(';').count());
        }
    }
}
