"""Draw example/report.png, the picture in README.md: parts of the report that `make demo` writes. Needs Chromium.

python example/draw_report.py runs/demo/personaplex/report.html
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

WIDTH, HEIGHT = 1280, 2000  # of the window; what is empty below the page is cut off
# The headline, the first row of measures, and one reply.
SHOWN = """<style>
nav, footer, section:not(#replies, #listen), details { display: none }
#replies .chart:nth-child(n+5), #listen article:nth-of-type(n+2) { display: none }
</style></head>"""


def main() -> None:
    report = Path(sys.argv[1]).read_text()
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        page.write_text(report.replace("</head>", SHOWN, 1))
        subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", page.as_uri()],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        picture = Image.open(shot).convert("RGB")
    background = Image.new("RGB", picture.size, picture.getpixel((0, HEIGHT - 1)))
    bottom = ImageChops.difference(picture, background).getbbox()[3]
    picture = picture.crop((0, 0, WIDTH, min(HEIGHT, bottom + 24)))
    picture.save(Path(__file__).with_name("report.png"), optimize=True)


if __name__ == "__main__":
    main()
