//! A person in front of a browser: the page shows what the guest paints, and what is typed there comes to the guest.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_integration::screen::guest::Screen;
use xtask::browser::Browser;
use xtask::painting::Painting;
use xtask::screen_demo;

const STEP: Duration = Duration::from_secs(60);
const PICTURE: Painting = Painting { frames: 2, ..Painting::USUAL };

/// Waits until the page shows all pixels of a picture.
fn shows(browser: &mut Browser, frame: u8) -> Result<()> {
    let begin = Instant::now();
    loop {
        let wrong = browser.canvas().map(|(size, pixels)| PICTURE.wrong(frame, size, &pixels));
        match wrong {
            Ok(0) => return Ok(()),
            other => ensure!(begin.elapsed() < STEP, "pixels of the page that are wrong: {other:?}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The page shows each of the guest's pixels; a key that is pressed there changes the guest's picture, and the page shows
/// that; the serial console beside it takes a command and shows what it says. All of it again after the display's death.
#[test]
fn a_page_is_a_screen_a_keyboard_and_a_console() -> Result<()> {
    let novnc = screen_demo::novnc()?;
    let mut screen = Screen::painted(PICTURE, &format!("web=127.0.0.1:0,novnc={}", novnc.display()))?;
    screen.shows(0)?;
    let url = screen.machine.get("vm.display")?["url"].as_str().unwrap_or_default().to_owned();
    let mut browser = Browser::open(&url, (1600, 900))?;
    let keyboard = screen.input("keyboard")?;
    for round in 0..2_u8 {
        if round == 1 {
            screen.kill("atoll-display")?;
        }
        browser.until("document.getElementById('status').textContent === 'connected'", STEP)?;
        shows(&mut browser, 0)?;
        // The guest answers a key with the other picture.
        screen.console().send(&format!(
            "dd if={keyboard} bs=24 count=1 of=/dev/null 2>/dev/null; cat /frame1 > /dev/fb0; echo an\"\"swered{round}\n"
        ))?;
        std::thread::sleep(Duration::from_millis(500));
        browser.evaluate("window.rfb.focus()")?;
        browser.press('a')?;
        shows(&mut browser, 1)?;
        screen.console().expect(&format!("answered{round}\r"), STEP)?;

        browser.evaluate("document.getElementById('lines').focus()")?;
        browser.enter(&format!("cat /frame0 > /dev/fb0\necho 4{round} | tr 4 9\n"))?;
        browser.until(&format!("document.getElementById('lines').textContent.includes('\\n9{round}')"), STEP)?;
        shows(&mut browser, 0)?;
    }
    drop(browser);
    screen.end()
}
