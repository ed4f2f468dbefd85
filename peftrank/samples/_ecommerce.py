"""Product titles of the simulated shop, written for this package.

A line is one title; `{a|b}` stands for either `a` or `b`.
"""

BRANDS = (
    "Tolvane", "Brindlewick", "Ostrapeak", "Quillmarsh", "Fennory", "Dunmoss", "Kelpora",
    "Larkhollow", "Mirvane", "Oakenfen", "Pellwright", "Sundrel", "Tarnwell", "Vexholm",
    "Wrenlow", "Yarrowgate",
)  # fmt: skip

TOPICS = {
    "baking": """
Springform cake tin, {20|26} cm
Banneton proofing basket, {round|oval}
Silicone {muffin mould|pastry mat}
Rolling pin with {thickness rings|marble barrel}
Digital {flour|dough} scale
Piping bags with {12|steel} nozzles
Stand mixer, {dough hook included|4.5 litre bowl}
Cooling rack for {cookies|loaves}
Bread {lame with spare blades|slicing guide}
Vanilla {pods, pack of five|extract, 100 ml}
Tart rings, {perforated|set of six}
Offset spatula for {icing|buttercream}
Oven {thermometer|stone for pizza}
""",
    "camping": """
{Two-person|Family} tent, waterproof
Down sleeping bag, {-5 °C|mummy shape}
Folding camp {stove|fire pit}
Headlamp for {night hikes|tents}
Inflatable sleeping {pad|pillow}
Water filter {straw|pouch} for hikes
Titanium {mug|cutlery} for backpackers
Hammock with {mosquito net|tree straps}
Trekking {poles, carbon|backpack, 55 l}
Tarp with {guy lines|aluminium pegs}
Bear-proof {food canister|cool box}
{Paracord|Carabiner} survival set
Enamel {kettle|plates} for the outdoors
""",
    "cycling": """
Bike helmet with {rear light|visor}
Bicycle chain {lube|cleaner kit}
Puncture {repair kit|proof tyre}, 28 inch
Padded cycling {shorts|gloves}
Bike lock, {chain|foldable}
Tyre pump, {floor|mini}
Pannier bags, {pair|roll top}
Handlebar {tape, cork|mount for phones}
Saddle for {road bikes|touring}
Clipless {pedals|shoes}
Dynamo lamp for {front|rear} wheel
Disc brake {pads|rotor} for mountain bikes
Reflective {vest|ankle bands} for riders
""",
    "gardening": """
Pruning shears, {bypass|anvil}
Tomato seeds, {heirloom mix|cherry type}
Raised bed {kit, larch|liner}
Watering can, {galvanised|long spout}
Compost {bin, 300 litres|thermometer}
Hand trowel for {planting|weeding}
Soaker hose for {flower beds|lawns}
Lawn {edger|scarifier}
Greenhouse {shelf|staging}, foldable
Slug {barrier|traps} for lettuce
Peat-free potting soil, {20|40} l
Bulb planter for {tulips|daffodils}
Gardener's {kneeling pad|gloves}
""",
    "dogs": """
Chew toy for {puppies|strong jaws}
No-pull harness for {hounds|terriers}
Grain-free dog {food, lamb|kibble}
Retractable dog {leash|lead, 8 m}
Orthopaedic bed for {old dogs|large breeds}
Slow feeder {bowl|lick mat} for pets
Fetch ball {launcher|set, floating}
Grooming brush for {shedding coats|curly fur}
Puppy training {treats|clicker}
Travel crate for {small dogs|pets}
Paw {balm|washer}
Tick {collar|remover}
Poop bags, {300|refill}
""",
    "coffee": """
Coffee grinder, {hand crank|conical burr}
Gooseneck kettle for {pour-over|brewing}
Espresso {tamper, 58 mm|machine, 15 bar}
Coffee filters, {100 pieces|unbleached}
French press, {double wall|8 cup}
Roasted {Arabica|decaf} beans, 1 kg
Milk {frother|pitcher} for lattes
Pour-over {dripper, ceramic|stand}
Cold brew coffee {jug|bags}
Moka pot, {three|six} cups
Espresso machine {descaler|cleaning brush}
Cappuccino cups, {set of four|stoneware}
Airtight {bean canister|caddy for ground coffee}
""",
    "knitting": """
Merino yarn, {50 g|hand dyed}
Knitting needles, {bamboo|circular}
Crochet hooks, {ergonomic|set of nine}
Knitting stitch {markers|holders}
Sock wool, {self-striping|four ply}
Row counter for {knitters|crochet}
Blocking {mats|pins} for sweaters
Alpaca {skein|blend}, natural grey
Pattern book: {twenty jumpers|shawls}
Yarn {bowl, wooden|tote bag}
Cable knit {needle trio|charts}
Wool {winder|ball swift}
Darning {mushroom|loom} for socks
""",
    "drawing": """
Watercolour {pans, 24|tubes}
Sketchbook, {A5|spiral bound}
Graphite pencils, {2H to 8B|tin of twelve}
Kneadable {eraser|rubber} for artists
Acrylic {paint set|markers}
Sable paint brushes, {round|travel set}
Oil {pastels|sticks}
Painter's easel, {tabletop|beech}
Fineliner pens for {sketching|comics}
Stretched canvas for {oils|acrylics}
Drawing charcoal, {sticks|powder}
Calligraphy nib {holder|assortment}
Light pad for {tracing|animation}
""",
    "fitness": """
Yoga {mat, 6 mm|blocks, cork}
Adjustable dumbbells, {20|24} kg
Workout resistance {bands|tubes}
Foam roller for {sore muscles|stretching}
Kettlebell, {cast iron|vinyl coated}
Jump rope for {cardio|boxers}
Door-frame {pull-up bar|sling trainer}
Protein {shaker|powder}, post-workout
Balance {board|ball} exercise trainer
Wrist wraps for {lifting|push-ups}
Rowing machine, {magnetic|water tank}
Gym {towel with pocket|chalk}
Heart rate {chest strap|armband}
""",
    "photography": """
Tripod, {carbon|travel} with ball head
Camera lens, {35|50} mm f/1.8
Camera {strap, leather|rain cover}
Memory card for {cameras|video}
Polarising lens filter, {67|77} mm
Softbox {lighting kit|for flash}
Lens cleaning {pen|cloths}
Instant photo film, {twin pack|monochrome}
Remote shutter {release|timer}
Padded {sling bag|insert} for mirrorless
White balance card for {studio|portraits}
Photo paper, {glossy|matte} A4
Spare camera battery with {charger|cable}
""",
    "woodworking": """
Chisel set, {bevel edge|four sizes}
Japanese pull saw, {rip|crosscut}
Joiner's clamps, {60 cm|quick grip}
Block plane, {low angle|iron body}
Orbital sander with {dust bag|discs}
Wood glue, {waterproof|500 g}
Dowel {jig|pins, beech}
Wood router bits, {half inch|dovetail}
Carpenter's {marking gauge|square}
Furniture {oil, linseed|varnish}
Cordless {drill|jigsaw}, 18 V
Workbench {vice|with drawers}
Oak {boards, planed|veneer sheets}
""",
    "skincare": """
Day cream with {SPF 30|hyaluronic acid}
Clay {face mask|cleanser} for oily skin
Lip {balm, beeswax|scrub}
Retinol {serum|night lotion}
Rose {face mist|toner}
Make-up remover {pads|balm}
Hand {cream, shea|lotion}
Micellar facial {water|wipes}
Sunscreen {stick|gel} for sensitive types
Jade face {roller|massage stone}
Under-eye {gel patches|serum}
Body butter, {cocoa|almond}
Foaming {wash, fragrance free|exfoliant}
""",
    "boardgames": """
Co-operative {island|dungeon} game, 2-4 players
Wooden chess {set|clock}
Playing cards, {linen finish|plastic}
Trivia {board game|quiz box}
Dice {tower|set, seven polyhedral}
Strategy board game: {trading ports|railways}
Party game of {bluffing|guessing}
Jigsaw puzzle, {1000|500} pieces
Role-playing {miniatures|rulebook}
Word tile game, {travel edition|deluxe}
Game card {sleeves|shuffler}
Murder mystery {dinner kit|puzzle book}
Solo {roll-and-write pad|escape room}
""",
    "office": """
Standing desk, {electric|converter}
Ergonomic {chair, mesh back|footrest}
Wireless keyboard, {quiet|split}
Computer monitor {arm|riser}
Noise-cancelling {headset|earplugs} for calls
Desk {lamp, dimmable|organiser}
Ergonomic mouse, {left handed|silent click}
Laptop {dock, USB-C|stand}
Office paper {shredder|tray}
Under-desk cable {tray|clips}
Whiteboard, {magnetic|glass}
Webcam with {privacy shutter|ring light}
Desk planner, {undated|tear-off}
""",
}
