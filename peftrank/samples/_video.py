"""Film and series titles of the simulated video domain, all invented for this package.

A line is one title; `{a|b}` stands for either `a` or `b`.
"""

TOPICS = {
    "science fiction": """
Stranded {Beyond Saturn|on the Ice Moon}
The Last {Starship|Space Station}
Androids {Never Weep|Dream of Mars}
Colony on {Planet Nine|the Far Moon}
The Wormhole {Cartographer|Protocol}
{Clones|Robots} of the Red Planet
Signal from {Deep Space|a Pulsar}
Captain of the {Nebula Fleet|Warp Engine}
Time {Machine in Hangar Six|Travellers from 3000}
Alien {Invasion|Ambassador}
Cryosleep {Lottery|Passengers}
The Galactic {Laser|Robot} War
Artificial Minds of {the Future|Andromeda}
""",
    "horror": """
The Evil {House|Cellar} That Whispers
Blood on the {Nursery Wall|Altar}
Terror {Crawls at Midnight|Under the Skin}
{Zombies|Ghouls} of Hollow Lane
The Possession of {Sister Agnes|Room 13}
Don't {Wake the Dead|Open the Coffin}
Scream, {Little Doll|Scarecrow}
Night of the {Vampire Bride|Slashers}
The Haunted {Asylum|Orphanage}
Curse of the {Black Mirror|Hanged Man}
A Monster {Breathes|Feeds} in the Attic
{Demon|Werewolf} Season
Graveyard {Nightmare|Ghosts}
""",
    "courtroom": """
{Objection Overruled|A Judge in Doubt}
The {Junior|Reluctant} Attorney
The Jury {Is Tired|of Strangers}
The Lawyer's {Closing Arguments|Opening Statement}
The Verdict {Comes Friday|of Judge Harrow}
{Cross-Examining|Suing} the Mayor
The {Defender|Prosecutor}'s Debt
The Innocence {Lawyers|Appeal}
Witness for the {Defence|State}
Courthouse {Blues|Steps}
The {Bribery|Perjury} Trial
Guilty {Plea|as Charged}
Law Firm {of Liars|on the Brink}
""",
    "heist": """
The {Vault|Diamond} Job
Four {Thieves|Crooks} and a Getaway Van
Cracking the {Casino Safe|Royal Mint}
The {Forger's|Safecracker's} Daughter
One Last {Burglary|Robbery}
{Bank Holiday|Armoured Truck} Stick-Up
Stealing the {Sultan's Emerald|Museum's Crown}
The Bank {Robber's Tip|Raid}
Swindlers {Anonymous|in Monaco}
Alarm at {Gallery West|the Jewellers}
{Pickpockets|Jewel Thieves} of the Grand Hotel
Thieves and {Steady Hands|a Double Cross}
Stolen {Loot and Loyalty|Millions for Three}
""",
    "romance": """
{Love|Kisses} at the Bus Stop
The Accidental {Bridesmaid|Fiancé}
Letters to {My Sweetheart|a Summer Crush}
Falling in Love with {the Florist|My Ex's Brother}
A {Wedding|Proposal} by the Lake
Second Chance {Valentine|Hearts}
Blind {Date Diaries|Dates and Bad Wine}
Married {by Mistake|Again}
Two {Hearts in Paris|Lovers, One Lease}
The {Matchmaker|Runaway Groom}
Honeymoon {for One|Swap}
Meet Me {Under the Mistletoe|on the Ferris Wheel}
Jilted {Bride|and in Love Again}
""",
    "western": """
{Gunslinger|Outlaw} at High Noon
The {Sheriff|Widow} of Dry Creek
Dust, Saddles and {Revenge|Whiskey}
Horseback {to Coyote Canyon|Across the Prairie}
Wanted: {the Outlaw Twins|the Calloway Gang}
{Cattle Drive|Stagecoach} to Nowhere
Six-Shooters {for Pedro|and Spurs}
The Saloon {Showdown|Singer's Colt}
{Bounty|Buffalo} Hunters of Salt Creek
Cowboys {and Lassos|Under the Moon}
Cowboy Ranch {at the Border|Feud}
Gold Rush {Graves|Desperados}
Tumbleweed {Justice|Marshal}
""",
    "nature": """
Secret Life of {Coral Reefs|Owls}
{Penguins|Seals} Against the Cold
The Great {Wildebeest|Butterfly} Migration
Jungle {Canopy at Night|of Giants}
Rivers {of the Salmon|Run Wild}
Hidden {Meadow Creatures|Burrows of the Badger}
The {Wolf|Bear} Cubs' First Year
Planet of {Insects|Fungi}
Ocean {Predators|Jellyfish}
Savannah {Lions|Elephants at the Waterhole}
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
Chef Michel's {Tiny Bistro|Burnt Toast}
Spice {Caravan|Route Suppers}
The Perfect {Roast|Loaf}
Dessert {Island|Duel}
""",
    "sports": """
The Final {Match|Lap}
{Boxer|Wrestler} from the Docks
Coach {Rivera's Misfits|on the Bench}
Marathon {of a Lifetime|Sisters}
Hoop {Hopes|City Champions}
The {Goalkeeper|Baseball Pitcher} Who Waited
Ice Rink {Rivals|Underdogs}
Sprint {to Gold|Relay}
The Team in {Ninth Inning|Overtime}
Surf {Contest|Finals, Big Wave}
Cycling {Champions|Race Breakaway}
The {Olympic|Tennis} Year
The Rookie {Season|Quarterback}
""",
    "war": """
{Trenches|Snow} of the Eastern Front
The {Bomber|Submarine} Crew
Letters from a {Fallen Soldier|Prisoner's Camp}
D-Day {Minus One|Medics}
Soldiers {Behind Enemy Lines|at the Barricades}
{Regiment|Platoon} of Ghost Hill
The Siege of {Fort Ardan|Winter Harbour}
The General {Orders Retreat|Without an Army}
Resistance {Radio|Couriers}
Army Tank {Brothers|Column}
Armistice {for the Soldiers|Train}
Battle {of the Beaches|and Mercy}
Fighter {Pilots' Summer|Squadron Girls}
""",
    "detective": """
The {Locked Room|Poisoned Teacup} Mystery
Inspector {Vale Investigates|Marlo's Hunch}
A Corpse {in the Library|at Low Tide}
{Private Eye|Sleuth} on Canal Street
Who Killed {the Organist|Madame Fontaine}?
The Missing {Heiress|Persons} Investigation
Detective Work: {Fingerprints|the Decanter}
The Murderer's {Alibi|Last Clue}
Murder {on the Night Ferry|by Metronome}
The Sleuth in {Trench Coat|Shadows}
{Homicide|Cold Case} Squad
Detective {Twins|in Slippers}
The Unsolved {Strangling|Murder Ledger}
""",
    "fantasy": """
{Dragon|Wizard} of the Silver Peak
The {Sword|Crown} of Elves
Quest for the {Enchanted Well|Phoenix Feather}
Sorceress {in Exile|of Thornwood}
{Goblin|Dwarf} King
Magic Realm of {Broken Spells|Runes}
The Wizard's Prophecy {Child|of Ash}
Knights {and Griffins|of the Faerie Court}
Unicorn {Rider|Hollow}
The Witch's {Apprentice|Bargain}
{Kingdom|Throne} Under the Mountain
Magic Amulet {Bearers|War}
Troll Bridge {Ballad|Gate}
""",
    "children": """
{Benny|Pip} the Brave Little Tugboat
Puppy {Playground|Parade}
The {Giggling|Sleepy} Teddy Bears
Counting with {Captain Carrot|Ducklings}
The Happy {Rainbow|Bubble} Bus
Dino {School|Babies' Picnic}
Tilly and the {Talking Tricycle|Cookie Lorry}
Alphabet {Animals|Train}
Mouse {in a Teapot|House Lullabies}
{Kitten|Piglet} Rescue Team
The Wobbly Little {Snowman|Jellyfish}
Storytime {Treehouse|with Uncle Hedgehog}
Toy Box {Adventures|Tales}
""",
    "music": """
{Jazz|Piano} in the Basement
The {Drummer|Cellist} Who Couldn't Hear
Garage Band {Forever|Breakup}
Encore for a {Singer|Forgotten Tenor}
{Opera|Choir} Behind Bars
Rock and Roll {Kings|Summer}
Four Chords {and a Lie|to Fame}
Pop {Star Backstage|Diva}
The Busker's {Symphony|Guitar}
Rap {Battle Borough|Dreams}
The Orchestra {in Chaos|and the Maestro's Ghost}
Punk Band {Sisters|on Tour}
Songs of the Karaoke {Nights|Queens}
""",
}
