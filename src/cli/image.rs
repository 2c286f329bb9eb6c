//! `bantam image`: what is in the cache of images.

use std::time::{Duration, SystemTime};

use bantam::config::duration;
use bantam::image::{self, Cache, Listed, Options, Pull, Source};
use clap::Subcommand;

use super::progress::ProgressLine;

/// The cache of images.
#[derive(Debug, Subcommand)]
pub enum Image {
    /// List the images in the cache, the one used last first.
    Ls {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Fetch or unpack images into the cache, and print their paths.
    Pull {
        /// What `bantam run` takes: docker://HOST/NAME:TAG, oci:PATH, an archive or a directory.
        #[arg(value_name = "ROOTFS", required = true)]
        sources: Vec<String>,
    },
    /// Remove images from the cache.
    Rm {
        /// Their names, digests, or first digits of digests.
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
    /// Remove all images that no machine uses.
    Prune {
        /// Keep those that have been used within this time: 30s, 60m, 24h.
        #[arg(long, value_name = "TIME", value_parser = duration::parse)]
        unused_for: Option<Duration>,
    },
}

impl Image {
    /// Does what is asked for, and adds to `told` what to print, also of what was done before a failure.
    pub fn run(&self, told: &mut String) -> Result<(), image::Error> {
        let cache = Cache::of_user()?;
        let removed = |listed: &Listed| format!("{} {}\n", listed.digest, size(listed.size));
        match self {
            Self::Ls { json: true } => *told += &format!("{:#}\n", serde_json::json!(cache.list()?)),
            Self::Ls { json: false } => *told += &table(&cache.list()?),
            Self::Pull { sources } => {
                for source in sources {
                    *told += &pull(&cache, source)?;
                }
            }
            Self::Rm { names } => {
                for name in names {
                    *told += &removed(&cache.remove(name)?);
                }
            }
            Self::Prune { unused_for } => {
                let before = SystemTime::now().checked_sub(unused_for.unwrap_or_default());
                let gone = cache.prune(before.unwrap_or(SystemTime::UNIX_EPOCH))?;
                told.extend(gone.iter().map(removed));
            }
        }
        Ok(())
    }
}

fn pull(cache: &Cache, source: &str) -> Result<String, image::Error> {
    let source: Source = source.parse()?;
    let line = ProgressLine::default();
    let options = Options { pull: Pull::Always, progress: Some(&line), ..Options::default() };
    let image = image::open(&source, cache, &options)?;
    Ok(format!("{}\n", image.path().display()))
}

fn table(list: &[Listed]) -> String {
    let mut lines = String::from("DIGEST        SIZE      IN USE  NAME\n");
    for listed in list {
        let name = if listed.names.is_empty() { listed.source.clone() } else { listed.names.join(", ") };
        let in_use = if listed.in_use { "yes" } else { "no" };
        lines.push_str(&format!("{:.12}  {:<8}  {in_use:<6}  {name}\n", listed.digest.hex(), size(listed.size)));
    }
    lines
}

fn size(bytes: u64) -> String {
    format!("{}M", bytes.div_ceil(1 << 20))
}
