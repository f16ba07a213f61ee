"""Render ten open-licensed emoji sets to 64 x 64 images, one name per thing across the sets.

Reads the npm packages `@iconify-json/*` (drawings) and `emojibase-data` (other names of a thing):

    npm i @iconify-json/{twemoji,noto,noto-v1,fluent-emoji,fluent-emoji-flat,fluent-emoji-high-contrast} \
          @iconify-json/{emojione,emojione-monotone,fxemoji,streamline-emojis} emojibase-data
    python data.py --node_modules node_modules --output DATA

writes DATA/images.npz (images, artist and name numbers), DATA/meta.json (names, chosen things, synonyms,
held-out pairs) and, with --attribution, ATTRIBUTION.md from the packages' own metadata. Nothing is downloaded
by this script.
"""

import collections
import io
import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image

from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
ARTISTS = {
    "Twemoji": "twemoji",
    "Noto": "noto",
    "Blobmoji": "noto-v1",
    "Fluent": "fluent-emoji",
    "Microsoft Flat": "fluent-emoji-flat",
    "High Contrast": "fluent-emoji-high-contrast",
    "EmojiOne": "emojione",
    "Monotone": "emojione-monotone",
    "Firefox OS": "fxemoji",
    "Streamline": "streamline-emojis",
}
SKIP = re.compile(r"skin-tone|^flag-|-low$|-high$|^keycap|-(dark|light|medium)(-|$)|medium-(light|dark)")
VOTERS = ("twemoji", "noto", "fluent-emoji-flat", "emojione", "noto-v1")  # these five use the Unicode names

# Names that a set gives to a thing against the Unicode name; checked by eye. In Firefox OS the plain animal
# name is the face.
OTHER_NAMES = json.loads((HERE / "other_names.json").read_text())


# Of the Unicode keywords, those that are another name of their thing and not a word about it; of the short
# names, those that are none.
KEYWORDS = set(
    "plane aeroplane cake loaf kitten kitty cherry martini puppy donut drop flame truck jewel eyewear "
    "grape stiletto bumblebee pumpkin citrus toadstool fungus capsule bunny heart yacht slug serpent berry "
    "tortoise spanner ladybird".split()
)
NOT_NAMES = {"yes", "flipper", "sunny", "birthday", "skeleton"}


def unicode_names(sets: dict) -> set[str]:
    """Names that at least two of the five Unicode-named sets use."""
    count = collections.Counter(name for s in VOTERS for name in sets[s]["icons"] if not SKIP.search(name))
    return {name for name, n in count.items() if n >= 2}


def choose_icons(sets: dict) -> dict[tuple[str, str], str]:
    """
    {(artist, thing): the icon's name in its package}. Names are mended: "-1" dropped, lost hyphens added.
    """
    names = unicode_names(sets)
    squashed = {name.replace("-", ""): name for name in names}
    chosen = {}
    for artist, package in ARTISTS.items():
        other = OTHER_NAMES.get(package, {})
        icons = [
            name
            for name, icon in sets[package]["icons"].items()
            if not SKIP.search(name) and not icon.get("hidden")
        ]
        # What was checked by eye comes first, then the first found.
        icons.sort(key=lambda name: name not in other)
        for name in icons:
            short = re.sub(r"-\d$", "", name)
            thing = other.get(name) or (
                name if name in names else short if short in names else squashed.get(short.replace("-", ""))
            )
            if thing is not None:
                chosen.setdefault((artist, thing), name)
    return chosen


def render(icons: dict, name: str) -> np.ndarray | None:
    """The drawing on white with a margin of two pixels, (64, 64, 3) uint8; None if it cannot be drawn."""
    import resvg_py

    icon = icons["icons"][name]
    size = [icon.get(k, icons.get(k, 16)) for k in ("width", "height")]
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {size[0]} {size[1]}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="240" height="240" color="black">{icon["body"]}</svg>'
    )
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=240, height=240, background="white"))
    except Exception as error:  # resvg raises plain ValueError for what it cannot parse
        print(f"skipped {name}: {str(error)[:80]}")
        return None
    canvas = Image.new("RGB", (64, 64), "white")
    # 240 = 4 x 60: exact area means.
    canvas.paste(Image.open(io.BytesIO(png)).convert("RGB").resize((60, 60), Image.BOX), (2, 2))
    image = np.asarray(canvas)
    return image if image.std() >= 3 else None


def spoken(name: str) -> str:
    """A thing's name as a caption says it."""
    return name.replace("-", " ")


def find_synonyms(node_modules: Path, things: list[str]) -> dict[str, list[str]]:
    """Up to three other names a thing, from `emojibase-data` (MIT).

    First the short names that GitHub, Slack and JoyPixels use, then Unicode keywords that are names. A word
    that is none (NOT_NAMES), or that names two things, is left out.
    """
    folder = node_modules / "emojibase-data" / "en"
    entries = {}
    for entry in json.loads((folder / "data.json").read_text()):
        entries.setdefault(
            re.sub(r"[^a-z0-9]+", "-", entry["label"].lower().replace("’", "")).strip("-"), entry
        )
    sources = [
        json.loads((folder / "shortcodes" / f"{s}.json").read_text())
        for s in ("github", "iamcal", "joypixels", "emojibase")
    ]
    found = {thing: [] for thing in things}
    for thing in set(things) & set(entries):
        names = []
        for codes in sources:
            code = codes.get(entries[thing]["hexcode"], [])
            names += [code] if isinstance(code, str) else code
        names += [tag for tag in entries[thing].get("tags", []) if tag in KEYWORDS]
        for name in names:
            name = name.replace("_", " ").replace("-", " ")
            if (
                name.isascii()
                and name.replace(" ", "").isalpha()
                and name not in NOT_NAMES | {*found[thing], spoken(thing)}
            ):
                found[thing].append(name)
    users = collections.Counter(name for names in found.values() for name in names)
    taken = {spoken(thing) for thing in things}
    return {t: [n for n in names if users[n] == 1 and n not in taken][:3] for t, names in found.items()}


def hold_out(things: list[str], pairs: set[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """One artist a thing is held out, each artist for a tenth of the things: [(thing, artist)]."""
    rng = random.Random(seed)
    order = list(things)
    rng.shuffle(order)
    artists = list(ARTISTS)
    held = []
    for i, thing in enumerate(order):
        choices = [artists[(i + k) % len(artists)] for k in range(len(artists))]
        held.append((thing, next(a for a in choices if (a, thing) in pairs)))
    return sorted(held)


def write_attribution(node_modules: Path, counts: dict[str, int], path: Path) -> None:
    """A table of the sets from each package's info.json and package.json."""
    lines = [
        "# Where the images come from",
        "",
        "The model was trained on the drawings of these ten emoji sets, read from their npm packages and "
        "rendered on",
        "white at 64 x 64. The names and other names of the things come from Unicode and `emojibase-data` "
        "(MIT).",
        "This table is written by `data.py` from the packages' own metadata.",
        "",
        "| artist | set | package | by | licence | images |",
        "|---|---|---|---|---|---|",
    ]
    for artist, package in ARTISTS.items():
        folder = node_modules / "@iconify-json" / package
        info = json.loads((folder / "info.json").read_text())
        version = json.loads((folder / "package.json").read_text())["version"]
        author, licence = info["author"], info["license"]
        by = f"[{author['name']}]({author.get('url', '')})"
        terms = f"[{licence['spdx']}]({licence.get('url', '')})"
        cells = [artist, info["name"], f"`@iconify-json/{package}` {version}", by, terms, counts[artist]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Changes made: rasterised, scaled to 60 x 60 with a white margin, and used as training images. The",
        "drawings are not redistributed here; pictures of the model may resemble them: keep this notice "
        "with it.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> None:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--node_modules", type=Path, required=True, help="folder with @iconify-json and emojibase-data")
    add("--output", type=Path, required=True)
    add("--things", type=Path, default=HERE / "things.txt", help="the things the denoiser learns, one a line")
    add("--min_artists", type=int, default=5, help="the VAE sees every thing that this many artists drew")
    add("--attribution", type=Path, help="write the table of sets here")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="only the chosen things")
    args = parser.parse_args()

    sets = {
        p: json.loads((args.node_modules / "@iconify-json" / p / "icons.json").read_text())
        for p in ARTISTS.values()
    }
    chosen = choose_icons(sets)
    things = args.things.read_text().split()
    count = collections.Counter(thing for _, thing in chosen)
    keep = {thing for thing, n in count.items() if n >= args.min_artists and not args.smoke} | set(things)
    names = sorted(keep)
    images, artist_ids, name_ids = [], [], []
    for (artist, thing), icon in sorted(chosen.items()):
        image = render(sets[ARTISTS[artist]], icon) if thing in keep else None
        if image is not None:
            images.append(image)
            artist_ids.append(list(ARTISTS).index(artist))
            name_ids.append(names.index(thing))

    pairs = {(list(ARTISTS)[a], names[n]) for a, n in zip(artist_ids, name_ids, strict=False)}
    args.output.mkdir(parents=True, exist_ok=True)
    np.savez(
        args.output / "images.npz",
        images=np.stack(images),
        artist=np.array(artist_ids),
        name=np.array(name_ids),
    )
    meta = dict(
        artists=list(ARTISTS),
        names=names,
        things=things,
        synonyms=find_synonyms(args.node_modules, things),
        held_out=hold_out(things, pairs, args.seed),
    )
    (args.output / "meta.json").write_text(json.dumps(meta, indent=1))
    per_artist = collections.Counter(list(ARTISTS)[a] for a in artist_ids)
    of_things = collections.Counter(a for a, n in pairs if n in set(things))
    print(
        f"{len(images)} images of {len(names)} things; {sum(of_things.values())} of the {len(things)} chosen"
    )
    for artist in ARTISTS:
        print(f"  {artist}: {per_artist[artist]}, of the chosen {of_things[artist]}")
    if args.attribution:
        write_attribution(args.node_modules, per_artist, args.attribution)


if __name__ == "__main__":
    main()
