//! What an image says of how it wants to be run.

use serde::{Deserialize, Serialize};

/// What an image says of how it wants to be run. Of a plain archive, a directory or a disk it is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The words before those of the command.
    pub entrypoint: Vec<String>,
    /// The command, if the user gives none.
    pub cmd: Vec<String>,
    /// Variables of the environment, as `NAME=VALUE`.
    pub env: Vec<String>,
    /// The folder to run in; empty: `/`.
    pub working_dir: String,
    /// `USER` or `USER:GROUP`, names or numbers; empty: root.
    pub user: String,
}

impl Config {
    /// What to run: the entrypoint, and `command` or, if that is empty, the image's own.
    pub fn command(&self, command: &[String]) -> Vec<String> {
        let command = if command.is_empty() { &self.cmd } else { command };
        [self.entrypoint.as_slice(), command].concat()
    }
}

impl From<&oci_spec::image::ImageConfiguration> for Config {
    fn from(image: &oci_spec::image::ImageConfiguration) -> Self {
        let Some(config) = image.config() else { return Self::default() };
        Self {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_takes_the_place_of_the_images_own() {
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let config = Config { entrypoint: words("env -i"), cmd: words("sh"), ..Config::default() };
        assert_eq!(config.command(&[]), words("env -i sh"));
        assert_eq!(config.command(&words("ls -l")), words("env -i ls -l"));
    }
}
