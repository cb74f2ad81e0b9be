//! The command line of `atoll-blk`.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use atoll_blk::disk::Disk;
use atoll_blk::storage::{Source, Storage};
use atoll_kit::session::{self, Conversation};
use atoll_kit::worker::Gate;
use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    path: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let storage = Storage::open(&Source::Path(cli.path), false, false)?;
    let gate = Gate::opened();
    let conversation = Arc::new(Mutex::new(Conversation::new(Disk::new(storage, 1, "x"), &gate)?));
    let listener = UnixListener::bind(&cli.socket).context("bind")?;
    loop {
        let (stream, _) = listener.accept()?;
        let end = session::serve(&conversation, stream);
        tracing::info!(%end, "front end gone");
        session::lock(&conversation).reset();
    }
}
