"""Film and series titles of the simulated video domain, all invented for this package.

A line is one title; `{a|b}` stands for either `a` or `b`.
"""

TOPICS = {
    "science fiction": """
Stranded {Beyond Saturn|on the Ice Moon}
The Last {Starship|Orbit}
Androids {Never Weep|at Dawn}
Colony {Nine Goes Dark|of Glass Domes}
The Wormhole {Cartographer|Protocol}
{Clones|Robots} of the Red Planet
Signal from {Deep Space|the Pulsar}
Captain of the {Nebula Fleet|Warp Engine}
Time {Loop in Hangar Six|Travellers' Union}
Alien {Harvest|Ambassador}
Cryosleep {Lottery|Passengers}
The {Gravity|Laser} War
Uploaded {Minds|Tomorrow}
""",
    "horror": """
The {House|Cellar} That Whispers
Blood on the {Nursery Wall|Altar}
They Crawl {at Midnight|Under the Skin}
{Zombies|Ghouls} of Hollow Lane
The Possession of {Sister Agnes|Room 13}
Don't {Look Behind You|Open the Coffin}
Scream, {Little Doll|Scarecrow}
Night of the {Vampire Bride|Slashers}
The Haunted {Asylum|Orphanage}
Curse of the {Black Mirror|Hanged Man}
Something {Breathes|Feeds} in the Attic
{Demon|Werewolf} Season
Graveyard {Lullaby|Choir}
""",
    "courtroom": """
{Objection Overruled|A Doubt Too Reasonable}
The {Junior|Reluctant} Attorney
The Jury {Is Tired|of Strangers}
Closing {Arguments|Statement}
The Verdict {Comes Friday|of Judge Harrow}
{Cross-Examining|In Contempt of} the Mayor
The {Defender|Prosecutor}'s Debt
The Innocence {Lawyers|Appeal}
Witness for the {Defence|State}
Habeas Corpus {Blues|County}
The {Bribery|Perjury} Trial
Guilty {Until Tuesday|as Charged}
Law Firm {of Liars|on the Brink}
""",
    "heist": """
The {Vault|Diamond} Job
Four {Thieves|Crooks} and a Getaway Van
Cracking the {Casino Safe|Royal Mint}
The {Forger's|Safecracker's} Daughter
One Last {Score|Robbery}
{Bank Holiday|Armoured Truck} Stick-Up
Stealing the {Sultan's Emerald|Museum's Crown}
The Inside {Cashier|Tip}
Con {Artists Anonymous|Game in Monaco}
Alarm at {Gallery West|the Jewellers}
{Pickpockets|Hackers} of the Grand Hotel
Laser Grid, {Steady Hands|Double Cross}
Loot {and Loyalty|for Three}
""",
    "romance": """
{Love|Kisses} at the Bus Stop
The Accidental {Bridesmaid|Fiancé}
Letters to {My Sweetheart|a Summer Crush}
Falling for {the Florist|My Ex's Brother}
A {Wedding|Proposal} by the Lake
Second Chance {Valentine|Hearts}
Blind {Date Diaries|Dates and Bad Wine}
Married {by Mistake|Again}
Two {Tickets to Paris|Lovers, One Lease}
The {Matchmaker|Runaway Groom}
Honeymoon {for One|Swap}
Meet Me {Under the Mistletoe|on the Ferris Wheel}
Jilted, {Then You|Joyfully}
""",
    "western": """
{Gunslinger|Outlaw} at High Noon
The {Sheriff|Widow} of Dry Creek
Dust, Saddles and {Revenge|Whiskey}
Ride {to Coyote Canyon|the Prairie Alone}
Wanted: {Dead or Paid|the Calloway Gang}
{Cattle Drive|Stagecoach} to Nowhere
Six {Bullets for Pedro|Spurs}
The Saloon {Showdown|Singer's Colt}
{Bounty|Buffalo} Hunters of Salt Creek
Lasso {Kid|Moon}
Ranch {at the Border|Feud}
Gold Rush {Graves|Desperados}
Tumbleweed {Justice|Marshal}
""",
    "nature": """
Secret Life of {Coral Reefs|Owls}
{Penguins|Seals} Against the Cold
The Great {Wildebeest|Butterfly} Migration
Jungle {Canopy at Night|of Giants}
Rivers {of the Salmon|Run Wild}
Hidden {Meadow|Burrows}
The {Wolf|Bear} Year
Planet of {Insects|Fungi}
Ocean {Predators|Drifters}
Savannah {Mothers|Waterhole}
Nests, {Dens and Hives|Webs and Shells}
How {Forests Talk|Whales Sing}
Tundra {Awakens|Survivors}
""",
    "cooking": """
{Pastry|Noodle} Showdown
The {Travelling|Midnight} Chef
Grandma's {Kitchen Rules|Secret Recipes}
Sharp Knives, {Hot Pans|Cold Soup}
Baking {Under Pressure|with the Neighbours}
Street {Food Nights|Tacos of the World}
Too Many {Soufflés|Cooks in Lyon}
From Farm to {Fork|Frying Pan}
{Barbecue|Pizza} Masters
Michel's {Tiny Bistro|Burnt Toast}
Spice {Caravan|Route Suppers}
The Perfect {Roast|Loaf}
Dessert {Island|Duel}
""",
    "sports": """
The Final {Whistle|Lap}
{Boxer|Wrestler} from the Docks
Coach {Rivera's Misfits|on the Bench}
Marathon {of a Lifetime|Sisters}
Hoop {Hopes|City Champions}
The {Goalkeeper|Pitcher} Who Waited
Ice Rink {Rivals|Underdogs}
Sprint {to Gold|Relay}
Down by Two, {Ninth Inning|Overtime}
Surf {Contest|Finals, Big Wave}
Peloton {Dreams|Breakaway}
The {Olympic|Tennis} Year
Rookie {Season|Quarterback}
""",
    "war": """
{Trenches|Snow} of the Eastern Front
The {Bomber|Submarine} Crew
Letters from a {Fallen Soldier|Prisoner's Camp}
D-Day {Minus One|Medics}
Behind {Enemy Lines|the Barricades}
{Regiment|Platoon} of Ghost Hill
The Siege of {Fort Ardan|Winter Harbour}
General {Orders Retreat|Without an Army}
Resistance {Radio|Couriers}
Tank {Brothers|Column}
The Armistice {Hour|Train}
Mines {at the Beach|and Mercy}
Biplane {Summer|Girls}
""",
    "detective": """
The {Locked Room|Poisoned Teacup} Mystery
Inspector {Vale Investigates|Marlo's Hunch}
A Corpse {in the Library|at Low Tide}
{Private Eye|Sleuth} on Canal Street
Who Killed {the Organist|Madame Fontaine}?
Missing {Heiress|Persons Bureau}
Fingerprints {Don't Lie|on the Decanter}
The {Alibi|Clue} Collector
Murder {on the Night Ferry|by Metronome}
Trench Coat and {Cigarettes|Shadows}
{Homicide|Cold Case} Squad
Detective {Twins|in Slippers}
The Unsolved {Strangling|Ledger}
""",
    "fantasy": """
{Dragon|Wizard} of the Silver Peak
The {Sword|Crown} of Elves
Quest for the {Enchanted Well|Phoenix Feather}
Sorceress {in Exile|of Thornwood}
{Goblin|Dwarf} King
Realm of {Broken Spells|Runes}
The Prophecy {Child|of Ash}
Knights {and Griffins|of the Faerie Court}
Unicorn {Rider|Hollow}
The Witch's {Apprentice|Bargain}
{Kingdom|Throne} Under the Mountain
Amulet {Bearers|War}
Troll Bridge {Ballad|Gate}
""",
    "children": """
{Benny|Pip} the Brave Little Tugboat
Puppy {Playground|Parade}
The {Giggling|Sleepy} Teddy Bears
Counting with {Captain Carrot|Ducklings}
{Rainbow|Bubble} Bus
Dino {School|Babies' Picnic}
Tilly and the {Talking Tricycle|Cookie Lorry}
Alphabet {Animals|Train}
Mouse {in a Teapot|House Lullabies}
{Kitten|Piglet} Rescue Team
The Wobbly {Snowman|Jellyfish Family}
Storytime {Treehouse|with Uncle Hedgehog}
Toy Box {Adventures|Tales}
""",
    "music": """
{Jazz|Piano} in the Basement
The {Drummer|Cellist} Who Couldn't Hear
Garage Band {Forever|Breakup}
Encore for {Lena|a Forgotten Tenor}
{Opera|Choir} Behind Bars
Vinyl {Kings|Summer}
Four Chords {and a Lie|to Fame}
Backstage {Pass|Diva}
The Busker's {Symphony|Guitar}
Rap {Battle Borough|Dreams}
Conducting {Chaos|the Maestro's Ghost}
Punk {Sisters|Never Dies}
Karaoke {Nights|Queens}
""",
}
