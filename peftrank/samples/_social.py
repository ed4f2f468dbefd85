"""What the invented members of the simulated network say about themselves.

A line is one pastime; `{a|b}` stands for either `a` or `b`. Jobs are unrelated to pastimes.
"""

NAMES = (
    "Ada", "Bela", "Cato", "Dara", "Emre", "Fenja", "Goran", "Hana", "Ivo", "Jora", "Kei", "Lumi",
    "Mira", "Nilo", "Oona", "Pavel", "Quin", "Runa", "Sami", "Tove", "Uma", "Vito", "Wanda", "Yara",
)  # fmt: skip

JOBS = (
    "Nurse", "Bus driver", "Accountant", "Plumber", "Dentist", "Teacher", "Postman", "Lawyer",
    "Electrician", "Student", "Retired", "Architect", "Cashier", "Chemist", "Translator", "Carer",
    "Engineer", "Farmer", "Optician", "Waiter", "Clerk", "Roofer", "Welder", "Midwife",
)  # fmt: skip

ASIDES = (
    "has two cats", "new in town", "drinks too much tea", "father of twins", "always late",
    "works nights", "grew up by the coast", "hates mornings", "mother of three", "newly married",
    "cannot sit still", "talks to strangers", "lives with grandma", "left-handed", "very tall",
    "looking for friends", "between jobs", "early riser", "colour-blind", "back from abroad",
)  # fmt: skip

TOPICS = {
    "classical music": """
plays {cello|viola} in a quartet
{sings|conducts} in a church choir
never misses the {opera|symphony}
practises {nocturnes|sonatas} every evening
second {oboe|violin} of the town orchestra
collects {baroque|concerto} recordings
tunes {harpsichords|a grand piano} by ear
queues for {philharmonic|recital} tickets
hums {arias|madrigals} at work
arranges {string trios|hymns}
reads {scores on the train|composers' letters}
blows the {French horn|bassoon} badly
""",
    "hiking": """
walks {long mountain trails|from hut to hut}
sleeps in {alpine shelters|a tent above the treeline}
climbs {every summit nearby|ridges at sunrise}
wears out {boots|two rucksacks} a year
{maps footpaths|waymarks the moor} as a volunteer
crossed {a glacier|the Pyrenees} on foot
scrambles up {crags|gorges} with friends
plans {week-long treks|pilgrim routes}
knows every {hut warden|cairn} in the valley
tests {rucksacks|rain jackets} in the hills
{snowshoes|backpacks} through national parks
guides {ramblers|school groups} uphill
""",
    "baking": """
bakes {sourdough|rye loaves} before dawn
decorates {wedding cakes|cupcakes}
always has {flour on the sleeves|dough in the fridge}
hunts for the perfect {croissant|cinnamon roll}
{swaps yeast starters|judges pie contests}
makes {puff pastry|macarons} from scratch
perfects {bagels|brioche}
pipes {buttercream roses|meringue}
brings {scones|brownies} to every meeting
{kneads|proves} challah on Fridays
runs a tiny {patisserie stall|biscuit club}
owns {nine rolling pins|forty cookie cutters}
""",
    "chess": """
solves {endgame studies|mate-in-three puzzles}
plays {blitz in the park|correspondence games}
teaches {the Sicilian|openings} to juniors
captains a {club team|league board}
still regrets {one queen sacrifice|a missed stalemate}
collects {old tournament books|wooden pawns}
hosts {simuls|rapid evenings} in a cafe
studies {grandmaster gambits|knight forks}
lost on time with {two rooks up|a won ending}
{arbiter|kibitzer} at weekend opens
defends the {French|Caro line} to the last pawn
beat {the club computer|a bishop ending} once
""",
    "running": """
training for {a first marathon|ten kilometres under forty}
jogs {before breakfast|with a pram}
{paces|organises} the Saturday fun run
counts {kilometres|heart beats} and personal bests
loves {ultra races|muddy cross-country}
does {intervals|sprints} on the old track
trots along {the canal|forest trails} daily
laces up {spikes|new trainers} each spring
recovers from {a stress fracture|shin splints}
chases {negative splits|a half in ninety}
carbo-loads for {relays|city races}
{hurdles|steeplechases} for the athletics club
""",
    "photography": """
shoots {street portraits|black and white film}
develops {negatives|prints} in a darkroom
chases {golden hour|long exposures}
always carries {a 50 mm lens|two cameras}
{exhibits|retouches} landscapes
restores {vintage rangefinders|faded family snapshots}
captures {weddings|neon signs} at night
tries {pinhole boxes|tilted lenses}
posts {macro close-ups|double exposures}
owns {eleven tripods|a medium format body}
edits {raw files|contact sheets} till late
waits hours for {the right light|one frame}
""",
    "gardening": """
grows {tomatoes|dahlias} on an allotment
prunes {roses|apple trees}
swaps {seeds|cuttings} with neighbours
fights {slugs|bindweed} without poison
builds {compost heaps|raised beds}
tends {a greenhouse of chillies|a wildflower lawn}
digs up {lawns for vegetables|old hedges}
plants {tulip bulbs|hardy perennials} each autumn
saves {heirloom beans|rainwater in barrels}
coaxes {figs|orchids} through winter
mulches {borders|strawberries}
weeds {a community plot|between paving stones}
""",
    "astronomy": """
grinds {telescope mirrors|lenses} at home
watches {meteor showers|Jupiter's moons}
sketches {craters|nebulae} by red light
logs {variable stars|eclipses}
drives far for {dark skies|a comet}
shows {Saturn|the Milky Way} to strangers
hosts {stargazing nights|planetarium tours}
hunts {supernovas|asteroids} with a small dome
images {galaxies|the Moon} through a refractor
names every {constellation|planet} on sight
polishes {eyepieces|a Dobsonian}
follows {space probes|the northern lights} obsessively
""",
    "programming": """
writes {open-source Rust|compilers for fun}
fixes bugs in {old Perl|kernels}
builds {small web apps|command-line tools}
goes to {hackathons|coding meetups}
trains {neural networks|bots} at the weekend
solders {microcontrollers|keyboards} and flashes firmware
reviews {pull requests|Python libraries} on trains
hacks {retro consoles|parsers} together
self-hosts {servers|databases} in the cupboard
golfs {shell scripts|regular expressions}
debates {type systems|editors} endlessly
ships {mobile games|plug-ins} solo
""",
    "theatre": """
acts in {amateur Shakespeare|village pantomimes}
paints {stage sets|scenery}
writes {one-act plays|monologues}
does {improv|stand-up} on Thursdays
sews {period costumes|masks} for the drama group
{prompts|directs} from the wings
auditions for {musicals|tragedies}
learns {lines in the bath|stage fighting}
runs {the lighting desk|a puppet troupe}
reviews {fringe plays|first nights}
understudies {Hamlet's ghost|the villain}
{produces|rehearses} farces in a barn
""",
    "birdwatching": """
counts {migrating geese|swifts}
keeps {binoculars by the window|a life list}
rings {warblers|owls} at dawn
builds {nest boxes|hides in the marsh}
recognises {finches by song|every gull}
photographs {kingfishers|herons} from a canoe
rises early for {nightingales|waders}
twitches {rare buntings|vagrant terns}
feeds {tits|robins} through winter
surveys {heathland larks|puffin colonies}
nurses {injured hawks|fledglings}
tracks {cuckoos|ospreys} to Africa
""",
    "sailing": """
races {dinghies|catamarans}
lives aboard {a ketch|an old sloop}
crossed {the Atlantic|the Baltic} under spinnaker
teaches {knots|navigation} to sea cadets
varnishes {hulls|masts} all winter
{crews|skippers} at regattas
dreams of {trade winds|a yacht}
moors {a gaff cutter|a trimaran} upriver
trims {jibs|mainsails} on Sundays
{restores|delivers} wooden boats
reads {tide tables|nautical charts} for fun
capsized {twice last summer|off the harbour}
""",
    "languages": """
learns {Finnish|Swahili} from podcasts
runs a {Spanish tandem|conversation table}
translates {haiku|Czech poems}
dreams in {Esperanto|three tongues}
collects {dictionaries|untranslatable words}
studies {Sanskrit grammar|sign and its dialects}
practises {Japanese kanji|Arabic script} daily
tutors {German|Portuguese} online
argues about {etymology|the subjunctive}
reads novels in {Icelandic|the original Russian}
fills notebooks with {idioms|verb tables}
{interprets|subtitles} for refugees and films
""",
    "pottery": """
throws {stoneware bowls|porcelain} on the wheel
mixes {glazes|ash slips}
fires {a wood kiln|raku} with friends
sculpts {clay figures|terracotta heads}
sells {mugs|tiles} at craft fairs
mends {broken china with gold|teapots}
shapes {vases|teacups} by hand
loads {the kiln|a shared oven of pinch pots}
digs {local clay|earthenware} from the riverbank
teaches {slab building|coil pots} to beginners
carves {sgraffito plates|lidded jars}
trims {foot rings|wonky jugs} on Mondays
""",
}
