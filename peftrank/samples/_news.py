"""Headlines of the simulated news domain, written for this package.

A line is one headline; `{a|b}` stands for either `a` or `b`.
"""

TOPICS = {
    "space": """
{Probe|Robot craft} returns {dust|pebbles} from a distant comet
Moon lander sends {its first pictures|a farewell message}
Telescope spots {water vapour around|clouds on} a far-off planet
{Astronauts|Crew} repair a leaking valve during a spacewalk
Rocket {explodes on the pad|lifts off after third attempt}
Rover {gets stuck in|climbs out of} a Martian dune
Dead satellite {tumbles back to Earth|narrowly misses orbiting station}
Galaxies {older than expected|caught colliding} puzzle astronomers
Solar sail {unfolds|fails to open} in orbit
New suits tested for {lunar|zero-gravity} work
Asteroid {will pass closer than thought|gets a tiny moon of its own}
Black hole seen {swallowing a star|burping out gas}
Meteor shower {peaks tonight|lights up northern skies}
""",
    "health": """
{Nurses|Doctors} warn of a busy flu season
Blood test {detects|rules out} dementia early
New {vaccine|nasal spray} protects infants from cough
Surgeons {transplant|rebuild} a windpipe in a first
Walking {after meals|uphill} lowers sugar levels, study says
Clinics run short of {antibiotics|insulin pens}
Trial of {migraine|asthma} pill shows promise
Sleeping badly? {Your heart may notice|What a therapist advises}
Hospital opens {a ward for long illness|night pharmacy}
Patients wait {months|longer than ever} for knee operations
Gene therapy {restores hearing in children|slows muscle disease}
Salt, stress and {blood pressure|kidneys}: what we know
{Midwives|Paramedics} ask for more staff
""",
    "football": """
Late header {rescues a point for|sinks} the visitors
Striker {ruled out with|returns after} hamstring injury
Keeper saves two penalties in {cup|semi-final} shoot-out
{Club sacks|Fans back} manager after five defeats
Midfielder signs {three-year deal|on loan} before deadline
Referee {explains|regrets} the disputed red card
Underdogs {stun|hold} league leaders away from home
Captain {scores hat-trick|misses open goal} in derby
Relegation looms as {defence crumbles|the attack runs dry}
Women's side {reaches the final|unbeaten in ten matches}
Young winger {called up|dropped} for national squad
Stadium {expansion approved|turf to be replaced} before new season
Offside rule {to be trialled again|splits coaches}
""",
    "food": """
{Chef|Grandmother} shares the secret of crisp potatoes
Ten ways to use {leftover rice|stale bread}
Why sourdough {rises better in winter|tastes different in every kitchen}
A {lentil|mushroom} stew for cold evenings
Tiny noodle bar {wins top award|draws queues round the block}
How to {brown butter|whisk egg whites} without fear
Olive harvest {fails again|best in years}, growers say
{Lemon|Plum} tart that needs five ingredients
Restaurant drops menus and {lets guests choose|serves what the farm brings}
Pickles, {kimchi|chutney} and the art of fermenting
Sharp cheddar or goat? {A tasting|Cheesemakers argue}
Is {garlic|basil} better fresh or dried?
Street vendors teach {dumpling folding|pancake flipping}
""",
    "weather": """
Heavy {snow|sleet} expected on Friday
Coast braces for {gales|storm surge}
Drought {empties reservoirs|enters third year} in the south
Hottest {June|night} since records began
River bursts its banks {overnight|for second time}
Thick fog {to linger|lifts slowly} over the valley
Hail the size of {plums|eggs} flattens greenhouses
Sunshine {returns|at last} for the long weekend
Hurricane {weakens before landfall|turns towards islands}
{Frost|Ice} warning issued for drivers
Lightning {sparks blaze|strikes church tower} after dry spell
Spring arrives {two weeks early|with icy winds}
Forecasters predict {a wet autumn|mild winter}
""",
    "markets": """
Shares {slide|rally} as inflation figures surprise
Central bank {holds|cuts} interest rates
Oil {jumps|slips} on supply fears
Retailer {issues profit warning|beats quarterly estimates}
Pension funds {turn to|flee} government bonds
Startup {raises millions|goes public} at record valuation
Currency {tumbles|steadies} after budget speech
House prices {fall for third month|outpace wages}
Regulator {fines broker|blocks merger} over insider trading
Gold {hits new high|loses its shine} amid uncertainty
Lender {to close branches|writes off bad loans}
Investors bet on {copper|wheat} shortage
Chipmaker's dividend {disappoints|doubles}
""",
    "cinema": """
Debut director wins {festival|jury} prize
Silent {comedy|masterpiece} restored frame by frame
Sequel {flops|triumphs} at the box office
Actress {turns down|steps into} superhero role
Screenwriters {end|threaten} strike
A three-hour {western|epic} that earns its length
Review: {a thriller|costume drama} with too many twists
Animated {fox|robot} charms critics
Stunt doubles to get {their own award|credit at last}
Small picture houses {reopen|sell out} in mountain towns
Documentary about {lighthouse keepers|bell ringers} stirs debate
Cult horror {remade|screened at midnight} forty years on
Casting begins for {spy|vampire} series
""",
    "archaeology": """
Roman {mosaic|bathhouse} found under car park
Divers {raise|photograph} bronze-age cargo
Tomb of {unknown queen|a scribe} opened in desert
Children dig up {Viking|medieval} coin hoard
Cave paintings {older than thought|show forgotten hunters}
Lost {city|temple} mapped by laser from above
Ancient {tablet|scroll} finally deciphered
Skeletons reveal {plague victims' diet|life of early farmers}
Museum returns {carved masks|looted statue}
Stone circle {was a calendar|had wooden twin}, excavators say
Mammoth {tusk|hunters' camp} emerges from thawing ground
Pottery shards rewrite {trade routes|history of wine}
Shipwreck timber dated to {fifteenth century|age of sail}
""",
    "cybersecurity": """
Hackers {leak|steal} passwords of millions
Ransomware {shuts|cripples} town hall computers
Phone flaw lets {strangers listen|apps read messages}
Police {arrest|unmask} phishing gang
Browser update {fixes|misses} critical bug
Fake {delivery texts|bank calls} empty accounts
Engineers {race|struggle} to patch server software
Spyware found on {journalists'|diplomats'} devices
Data breach at {airline|dating site} confirmed
Teenager finds hole in {school network|smart doorbells}
Is your {router|webcam} safe? Five checks
Encryption law {worries privacy groups|delayed}
Botnet of {toasters and fridges|hijacked cameras} taken offline
""",
    "wildlife": """
Wolves {return to|seen near} mountain villages
Rare {orchid|beetle} rediscovered after a century
Whale {freed from nets|song recorded in harbour}
Otters {thrive|give birth} in cleaned-up canal
Volunteers carry toads {across busy road|to safer ponds}
Storks {nest on crane|skip their migration}
Bees {prefer|vanish from} city rooftops
Elephant herd {crosses highway|raids banana farm}
Zoo welcomes {red panda twins|newborn tapir}
Eagle chicks {hatch live on camera|tagged by rangers}
Octopus {uses shells as shield|escapes aquarium}
Badger {sett halts building work|cull ends}
Coral {spawns in laboratory|bleaching spreads}
""",
    "transport": """
Night trains {make a comeback|cut for lack of carriages}
Cyclists get {wider lanes|a tunnel of their own}
Electric buses {freeze|replace diesel} in winter trial
Airport {baggage handlers walk out|adds second runway}
Ferry {runs aground|resumes island service}
Tolls {scrapped|to rise} on motorway bridge
Commuters face {month of closures|delays on northern line}
Driverless taxis {hit the streets|stopped after crash}
Trams {turn fifty|extended to suburbs}
Rail fares {frozen|climb} again
Car makers {recall hatchbacks|drop petrol engines}
Pilots {test hydrogen plane|demand rest between flights}
Parking {fees double|space becomes park} downtown
""",
    "courts": """
Jury {clears|convicts} former treasurer of fraud
Judge {orders retrial|postpones verdict} in arson case
Witness {breaks silence|changes story} at murder trial
Detectives reopen {decades-old killing|cold case}
Burglars {caught by parrot|jailed for museum raid}
Appeal {rejected|granted} for convicted poisoner
Lawyers clash over {forged will|confession}
Smugglers sentenced after {harbour sting|cigarette haul}
Stolen {violin|painting} recovered in attic raid
Prosecutors {drop charges|seek ten years} in bribery scandal
Missing heiress: {suspect questioned|new clue}
Prison {break foiled|inmates sue over heat}
Settlement reached in {libel|asbestos} lawsuit
""",
    "schools": """
Pupils {sit|boycott} national exams
Teachers {demand smaller classes|vote on pay offer}
University {scraps fees|opens campus} for nurses
Children learn fractions {by baking|with drums}
Homework {ban divides parents|clubs spread}
Headmistress {retires|honoured} after forty years
Reading scores {recover|sink} after lockdown
Students build {bridge from spaghetti|boat from bottles}
Kindergartens {lack staff|move outdoors}
Graduates struggle with {loans|first jobs}
Chalkboards out, {tablets in|pens back}, says ministry
Later lessons {help sleepy teens|dropped by boards}
Scholarships for {rural|refugee} learners
""",
    "music": """
Pianist, {12|91}, fills concert hall
Rock band {reunites|splits} after farewell tour
Choir {sings from balconies|seeks tenors}
Opera house {stages jazz|cancels premiere}
Lost {symphony|sonata} turns up in library
Vinyl {outsells discs|pressing plant reopens}
Festival headliner {loses voice|plays for four hours}
Rapper {samples folk tune|releases surprise album}
Violin maker {at work for sixty years|trains apprentices}
Orchestra {tunes down|hires its first woman conductor}
Songwriter sues over {chorus|bass line}
Drummers set {marching|world} record
Accordion {craze sweeps clubs|lessons free for all}
""",
}
